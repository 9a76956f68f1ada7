"""Other databases and locations: PostgreSQL tables made by SQLAlchemy, locations behind ssh, bad locations."""

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

from support import MB, TRANSFER, service, sha256, until

MODELS = Path(__file__).with_name("ops_db_models.py")


# ---------------------------------------------------------------- PostgreSQL


@pytest.fixture
def database():
    """A new database in the test server; its SQLAlchemy URL."""
    server = sa.make_url(service("TEST_POSTGRES_URL"))
    name = f"test_{uuid.uuid4().hex}"

    def execute(statement):
        engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    execute(f"CREATE DATABASE {name}")
    yield server.set(database=name)
    execute(f"DROP DATABASE {name} WITH (FORCE)")


def models(*arguments):
    done = subprocess.run(
        [sys.executable, "-B", MODELS, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize("labels", ["names", "values", "text"])
def test_tables_made_by_sqlalchemy(deployment, database, labels):
    """The same as on SQLite; only our own tables are created or altered."""
    url = database.render_as_string(hide_password=False)
    models("create", url, labels)
    engine = sa.create_engine(database)
    package = deployment.origin / "2026" / "a.tar"
    package.parent.mkdir()
    package.write_bytes(b"x" * MB)
    with engine.begin() as connection:
        for name, path in [("ccat", deployment.origin), ("cologne", deployment.destination)]:
            connection.execute(
                sa.text(
                    "UPDATE disk_data_location SET path = :path, host = NULL WHERE data_location_id ="
                    " (SELECT l.id FROM data_location l JOIN site s ON s.id = l.site_id"
                    " WHERE s.short_name = :name AND l.name = 'buffer')"
                ),
                {"path": str(path), "name": name},
            )
        connection.execute(sa.text("UPDATE data_transfer_package SET size = :size"), {"size": MB})
        transfer = connection.execute(sa.text("SELECT id FROM data_transfer")).scalar_one()
    deployment.settings(
        ops_db={
            "database_type": "postgresql",
            "database_postgresql_database": database.database,
            "database_postgresql_user": database.username,
            "database_postgresql_host": database.host,
            "database_postgresql_port": database.port,
        }
    )

    before = set(sa.inspect(engine).get_table_names())
    assert "exists already and was not changed" in deployment.cli("db", "migrate")
    made = set(sa.inspect(engine).get_table_names()) - before
    assert all(table.startswith("transfer_worker_") for table in made), made
    assert deployment.cli("db", "seed", deployment.directory / "topology.toml", check=False).returncode == 6

    deployment.worker()
    with deployment.app() as app:
        assert app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30) is None
    seen = json.loads(models("show", url, labels))
    assert seen["status"] == "COMPLETED"
    assert seen["unpack_status"] == "PENDING"
    assert seen["has_start_time"] and seen["has_end_time"] and seen["end_is_not_in_the_future"]
    assert seen["failure_error_message"] is None
    [[status, log]] = seen["logs"]
    assert status == "COMPLETED" and Path(log).is_file()
    assert sha256(deployment.destination / "2026" / "a.tar") == sha256(package)
    engine.dispose()


# ---------------------------------------------------------------- ssh


def reach_by_ssh(deployment, site):
    """Puts a site's location behind the test's sshd; 127.0.0.1 is not one of this host's names."""
    ssh = {
        "port": int(service("TEST_SSHD_PORT")),
        "identity_file": service("TEST_SSH_IDENTITY"),
        "known_hosts_file": service("TEST_SSH_KNOWN_HOSTS"),
        "user": service("TEST_SSH_USER"),
        "max_package_bytes": 0,
    }
    deployment.settings(ssh=ssh)
    deployment.double(ANYHOST=1)
    execute(
        deployment,
        "UPDATE disk_data_location SET host = '127.0.0.1' WHERE data_location_id ="
        " (SELECT l.id FROM data_location l JOIN site s ON s.id = l.site_id WHERE s.short_name = ?)",
        site,
    )


def execute(deployment, sql, *values):
    with contextlib.closing(sqlite3.connect(deployment.database, timeout=20)) as connection, connection:
        connection.execute(sql, values)


@pytest.mark.parametrize("remote", ["origin", "destination"])
def test_one_end_behind_ssh(deployment, remote):
    transfer = deployment.package("packages/a b'ü.tar")
    reach_by_ssh(deployment, deployment.origin_site if remote == "origin" else deployment.destination_site)
    deployment.worker()
    with deployment.app() as app:
        assert app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=60) is None
    deployment.assert_moved(transfer)
    [copy] = deployment.copies()
    assert sum("127.0.0.1:" in word for word in copy["argv"]) == 1


def control_socket(copy):
    """Path of the control socket in the command by which bbcp starts itself at the other end."""
    [start] = [word for word in copy["argv"] if "-oControlPath=" in word]
    return Path(re.search("-oControlPath=([^ ]+)", start)[1])


def processes_with(text):
    """Command lines that contain the text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text(errors="replace").split("\0")
            if any(text in word for word in words):
                found.append(words)
    return found


def test_each_worker_has_one_connection_which_ends_with_it(deployment):
    """Also after kill -9, in the middle of a copy."""
    reach_by_ssh(deployment, deployment.destination_site)
    deployment.double(ANYHOST=1, RATE=MB)
    first, other = deployment.worker(concurrency=2), deployment.worker(name="other", concurrency=2)
    transfers = [deployment.package(f"{n}.tar", size=20 * MB) for n in range(4)]
    with deployment.app() as app:
        for transfer in transfers:
            app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        until(lambda: len(deployment.copies()) == 4, "all are copied")
    sockets = {control_socket(copy) for copy in deployment.copies()}
    assert len(sockets) == 2, sockets
    assert all(processes_with(str(socket)) for socket in sockets)
    first.kill()
    other.signal(signal.SIGQUIT)
    other.ended()
    for socket in sockets:
        until(lambda: not processes_with(str(socket)), "no ssh is left", seconds=10)
        until(lambda: not socket.parent.exists(), "no socket is left")


def test_two_remote_ends_are_refused(deployment):
    transfer = deployment.package()
    for site in (deployment.origin_site, deployment.destination_site):
        reach_by_ssh(deployment, site)
    failed(deployment, transfer, "both_ends_remote")


# ---------------------------------------------------------------- without a broker


def test_run_in_the_foreground(deployment):
    transfer = deployment.package()
    done = json.loads(deployment.cli("--json", "transfers", "run", transfer))
    assert (done["outcome"], done["bytes"]) == ("copied", MB)
    deployment.assert_moved(transfer)
    assert "was completed before" in deployment.cli("transfers", "run", transfer)
    assert len(deployment.copies()) == 1
    assert deployment.cli("transfers", "run", 4711, check=False).returncode == 3


def failed(deployment, transfer, code, status="FAILED"):
    """Runs the transfer: it fails with `code`, and row and history agree."""
    done = deployment.cli("transfers", "run", transfer, check=False)
    assert done.returncode == 1, done.stderr
    row = deployment.row(transfer)
    assert row["status"] == status
    [attempt] = deployment.rows("SELECT * FROM transfer_worker_attempt WHERE data_transfer_id = ?", transfer)
    assert attempt["error_code"] == code, attempt["message"]
    assert attempt["message"] == row["failure_error_message"]
    assert attempt["message"] in done.stderr
    assert deployment.temporary_files() == [] and deployment.leases() == []
    return attempt["message"]


@pytest.mark.parametrize("kind", ["S3", "TAPE"])
def test_unsupported_storage_is_refused(deployment, kind):
    transfer = deployment.package()
    execute(deployment, "UPDATE data_location SET storage_type = ? WHERE site_id = 2", kind)
    failed(deployment, transfer, "location_unsupported")
    assert deployment.copies() == []


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch /tmp/pwned", "a b", "user@host", "x;reboot", "$(reboot)", "a:b"]
)
def test_hosts_that_look_like_options_are_refused(deployment, host):
    transfer = deployment.package()
    execute(deployment, "UPDATE disk_data_location SET host = ? WHERE data_location_id = 2", host)
    assert host in failed(deployment, transfer, "host_invalid")
    assert deployment.copies() == []


def test_too_little_space_fails_before_the_copy(deployment):
    transfer = deployment.package()
    deployment.settings(transfer={"free_space_margin": 1 << 60})
    failed(deployment, transfer, "storage_low", status="PENDING")
    assert deployment.copies() == []


def test_missing_bbcp_is_reported(deployment):
    transfer = deployment.package()
    deployment.settings(bbcp={"program": "/nowhere/bbcp"})
    assert "/nowhere/bbcp" in failed(deployment, transfer, "program_missing")


def test_a_directory_is_not_a_package(deployment):
    transfer = deployment.package("packages/d.tar")
    (deployment.origin / "packages" / "d.tar").unlink()
    (deployment.origin / "packages" / "d.tar").mkdir()
    failed(deployment, transfer, "origin_not_a_file")


@pytest.mark.parametrize("path", ["../secret.tar", "/etc/passwd", "a/../../secret.tar", "a\nb.tar"])
def test_paths_stay_below_their_location(deployment, path):
    transfer = deployment.package()
    execute(deployment, "UPDATE data_transfer_package SET relative_path = ?, file_name = 'secret.tar'", path)
    failed(deployment, transfer, "path_invalid")


def test_invalid_settings_and_schema_are_explained(deployment):
    """All errors are reported at once, each with its remedy."""
    deployment.settings(bbcp={"streamz": 4, "streams": 99}, transfer={"digest": "crc"})
    done = deployment.cli("config", "check", check=False)
    assert done.returncode == 4
    for text in ["bbcp.streamz: unknown key; the nearest one is `bbcp.streams`", "transfer.digest: ", "bbcp.streams: must be 1 to 64"]:
        assert text in done.stderr
    deployment.settings()
    execute(deployment, "ALTER TABLE data_transfer RENAME COLUMN retry_count TO retries")
    execute(deployment, "DROP TABLE transfer_worker_lease")
    done = deployment.cli("worker", check=False)
    assert done.returncode == 4
    for text in ["data_transfer.retry_count", "transfer_worker_lease", "ccat-transfer db migrate"]:
        assert text in done.stderr
