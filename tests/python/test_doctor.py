"""`ccat-transfer doctor`: green without a fault, and red exactly for the faulty part, with a remedy."""

import contextlib
import json
import signal
import socket
import sqlite3
import uuid
from pathlib import Path

import pytest
import redis

from support import MB, Deployment, Process, clean_environment, descendants, service, until
from variants import ssh_settings

RED, GREEN, YELLOW, SKIPPED = "red", "green", "yellow", "skipped"


class Clinic:
    """A deployment with one destination on this host and one by ssh, and its doctor."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.far = deployment.directory / "far"
        self.far.mkdir()
        self.place(str(self.far))
        self.settings()

    def place(self, path):
        """Puts the far site's directory into the database."""
        topology = self.deployment.directory / "far.toml"
        topology.write_text(
            f"""
[[sites]]
name = "Far {self.deployment.destination_site}"
short_name = "far-{self.deployment.destination_site}"
[[sites.locations]]
name = "archive"
type = "buffer"
storage = "disk"
host = "127.0.0.1"
path = "{path}"
[[routes]]
origin = "{self.deployment.origin_site}"
destination = "far-{self.deployment.destination_site}"
method = "bbcp"
type = "direct"
"""
        )
        self.deployment.cli("db", "seed", topology)

    def settings(self, **sections):
        ssh = ssh_settings()
        bbcp = {"remote_program": str(self.deployment.program)}
        merged = {"ssh": ssh | sections.pop("ssh", {}), "bbcp": bbcp | sections.pop("bbcp", {})}
        self.deployment.settings(**merged, **sections)

    def examine(self, *args):
        """Exit code, and the findings as a list of (check, subject, verdict, found, advice)."""
        done = self.deployment.cli("doctor", "--json", *args, check=False)
        assert done.stdout, done.stderr
        report = json.loads(done.stdout)
        assert report["ok"] == (done.returncode == 0)
        return done.returncode, report["checks"]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, bbcp, broker):
    deployment = Deployment(tmp_path_factory.mktemp("clinic"), bbcp, broker)
    yield Clinic(deployment)
    deployment.close()


def closed_port():
    """A port of this host without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def broker_url(clinic, login="guest:guest", port=None, path="//", scheme="amqp"):
    host = clinic.deployment.broker.url.partition("@")[2].partition("/")[0]
    return f"{scheme}://{login}@127.0.0.1:{port or host.partition(':')[2]}{path}"


def test_all_is_well(clinic, broker):
    clinic.settings()
    code, findings = clinic.examine()
    assert code == 0
    assert {finding["verdict"] for finding in findings} == {GREEN}, findings
    checks = [finding["check"] for finding in findings]
    for check in ("settings", "database", "broker", "queues", "results", "ssh", "remote_bbcp", "digest", "write"):
        assert check in checks
    # No object is left over, and none was made that others would see.
    deployment = clinic.deployment
    assert not list(clinic.far.iterdir()) and not list(deployment.destination.iterdir())
    assert broker._declared(f"{deployment.destination_site}_buffer_data_transfer") is None
    assert not list(redis.Redis.from_url(service("TEST_REDIS_URL")).scan_iter("*celery-worker-probe*"))
    # The text for people has one line for each check.
    shown = deployment.cli("doctor", "--skip", "ssh,remote_bbcp", "--site", deployment.destination_site)
    assert "✔ green   broker" in shown and "remote_bbcp" not in shown and "far-" not in shown
    assert "\x1b" not in shown and shown.rstrip().endswith("0 yellow, 0 red, 0 skipped")


def wrong_password(clinic):
    clinic.settings(celery={"broker_url": broker_url(clinic, "guest:wrong")})


def missing_vhost(clinic):
    clinic.settings(celery={"broker_url": broker_url(clinic, path="/nowhere")})


def broker_down(clinic):
    clinic.settings(celery={"broker_url": broker_url(clinic, port=closed_port())})


def unknown_host(clinic):
    clinic.settings(celery={"broker_url": "amqp://guest@no-such-host.invalid//"})


def plain_port_for_tls(clinic):
    clinic.settings(celery={"broker_url": broker_url(clinic, scheme="amqps")})


@contextlib.contextmanager
def without_permission(clinic):
    user = f"u{uuid.uuid4().hex[:8]}"
    broker = clinic.deployment.broker
    broker.ctl("add_user", user, "secret")
    try:
        # All queues except those for remote control.
        broker.ctl("set_permissions", "-p", "/", user, "^(?!.*pidbox).*$", ".*", ".*")
        clinic.settings(celery={"broker_url": broker_url(clinic, f"{user}:secret")})
        yield
    finally:
        broker.ctl("delete_user", user)


@contextlib.contextmanager
def memory_alarm(clinic):
    clinic.settings()
    clinic.deployment.broker.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        yield
    finally:
        clinic.deployment.broker.ctl("set_vm_memory_high_watermark", "0.4")


@contextlib.contextmanager
def queue_with_other_arguments(clinic):
    clinic.settings()
    queue = f"{clinic.deployment.destination_site}_buffer_data_transfer"
    with clinic.deployment.broker.channel() as channel:
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-max-priority": 5})
    try:
        yield
    finally:
        with clinic.deployment.broker.channel() as channel:
            channel.queue_delete(queue)


def redis_down(clinic):
    clinic.settings(celery={"result_backend": f"redis://127.0.0.1:{closed_port()}/0"})


def no_result_tables(clinic):
    database = clinic.deployment.directory / "results.sqlite"
    database.touch()
    clinic.settings(
        celery={"result_backend": f"db+sqlite:///{database}", "database_create_tables_at_setup": False}
    )


def health_redis_down(clinic):
    clinic.settings(health={"redis_url": f"redis://127.0.0.1:{closed_port()}/0"})


def no_database(clinic):
    clinic.settings(ops_db={"database_sqlite_database": str(clinic.deployment.directory / "none.sqlite")})


def database_copy(clinic, sql):
    copy = clinic.deployment.directory / f"{uuid.uuid4().hex}.sqlite"
    with sqlite3.connect(clinic.deployment.database) as there, sqlite3.connect(copy) as here:
        there.backup(here)
        here.executescript(sql)
    clinic.settings(ops_db={"database_sqlite_database": str(copy)})


def pending_migration(clinic):
    database_copy(clinic, "DROP TABLE transfer_worker_delay")


def wrong_schema(clinic):
    database_copy(clinic, "ALTER TABLE data_transfer RENAME COLUMN retry_count TO retries")


def sshd_down(clinic):
    clinic.settings(ssh={"port": closed_port()})


def login_refused(clinic):
    key = clinic.deployment.directory / "no_key"
    clinic.settings(ssh={"identity_file": str(key)})


def unknown_host_key(clinic):
    known = clinic.deployment.directory / "known_hosts"
    known.touch()
    clinic.settings(ssh={"known_hosts_file": str(known), "options": ["StrictHostKeyChecking=yes"]})


def no_bbcp(clinic):
    clinic.settings(bbcp={"program": "/no/bbcp"})


def no_remote_bbcp(clinic):
    clinic.settings(bbcp={"remote_program": "/no/bbcp"})


def no_remote_digest(clinic):
    clinic.settings(ssh={"sha256_command": ["no-such-sum"]})


def no_room(clinic):
    clinic.settings(transfer={"free_space_margin": 1 << 60})


def no_log_dir(clinic):
    # A path below a file.
    clinic.settings(transfer={"log_dir": str(clinic.deployment.config / "logs")})


@contextlib.contextmanager
def read_only_destination(clinic):
    clinic.settings()
    # Even root cannot write there.
    clinic.place("/proc/sys")
    try:
        yield
    finally:
        clinic.place(str(clinic.far))


@contextlib.contextmanager
def destination_not_mounted(clinic):
    clinic.settings()
    clinic.place(str(clinic.far / "missing"))
    try:
        yield
    finally:
        clinic.place(str(clinic.far))


def skewed_clock(clinic):
    """The real ssh, to a host whose `date` is an hour behind."""
    folder = clinic.deployment.directory / uuid.uuid4().hex
    folder.mkdir()
    date = folder / "date"
    date.write_text("#!/bin/sh\nexec /bin/date -d '-1 hour' \"$@\"\n")
    ssh = folder / "ssh"
    ssh.write_text(
        '#!/bin/bash\nexec ssh "${@:1:$#-1}" "PATH=%s:\\$PATH ${!#}"\n' % folder
    )
    for program in (date, ssh):
        program.chmod(0o755)
    clinic.settings(ssh={"program": str(ssh)})


@contextlib.contextmanager
def ports_taken(clinic):
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        clinic.settings(bbcp={"port_range": f"{port}:{port}"})
        yield


def bad_settings(clinic):
    clinic.settings(transfer={"retry_delay_jitter": 2.0})


BREAKS = {
    wrong_password: ("broker", "login", "change_password"),
    missing_vhost: ("broker", "virtual host", "add_vhost"),
    broker_down: ("broker", "connection", "start the broker"),
    unknown_host: ("broker", "host name", "resolver"),
    plain_port_for_tls: ("broker", "TLS", "broker_ssl_ca_file"),
    without_permission: ("permissions", "configure", "set_permissions"),
    memory_alarm: ("permissions", "low on memory", "rabbitmq-diagnostics alarms"),
    queue_with_other_arguments: ("queues", "x-max-priority", "celery.task_queues"),
    redis_down: ("results", "cannot be reached", "celery.result_backend"),
    no_result_tables: ("results", "celery_taskmeta", "celery.result_backend"),
    health_redis_down: ("health", "refused", "health.redis_url"),
    no_database: ("database", "does not exist", "db migrate"),
    pending_migration: ("schema", "transfer_worker_delay is missing", "db migrate"),
    wrong_schema: ("schema", "data_transfer.retry_count is missing", "Alembic"),
    sshd_down: ("ssh", "refused", ""),
    login_refused: ("ssh", "Permission denied", "authorized"),
    unknown_host_key: ("ssh", "host key", "known"),
    no_bbcp: ("bbcp", "/no/bbcp", ""),
    no_remote_bbcp: ("remote_bbcp", "/no/bbcp", ""),
    no_remote_digest: ("digest", "no-such-sum", ""),
    no_room: ("space", "EiB must stay free", "free_space_margin"),
    read_only_destination: ("write", "/proc/sys", "permission"),
    destination_not_mounted: ("write", "does not exist", "Mount"),
    skewed_clock: ("clock", "behind this host's clock", "chrony"),
    ports_taken: ("ports", "0 of the 1 ports", "bbcp.port_range"),
    no_log_dir: ("log_dir", "cannot be created", "transfer.log_dir"),
    bad_settings: ("settings", "retry_delay_jitter", "correct it"),
}


FAR = {
    *(sshd_down, login_refused, unknown_host_key, no_remote_bbcp, no_remote_digest, skewed_clock),
    *(read_only_destination, destination_not_mounted, no_room),
}


@pytest.mark.parametrize("breaking", BREAKS, ids=lambda breaking: breaking.__name__)
def test_one_thing_is_broken(clinic, breaking):
    """The broken part is red, with its reason and its remedy; dependent checks are skipped, and the rest is green."""
    check, reason, remedy = BREAKS[breaking]
    broken = breaking(clinic)
    with broken if hasattr(broken, "__enter__") else contextlib.nullcontext():
        # Other hosts are checked only if the fault concerns one, because that takes long.
        code, findings = clinic.examine(*([] if breaking in FAR else ["--site", clinic.deployment.destination_site]))
    assert code == 1
    red = [finding for finding in findings if finding["verdict"] == RED]
    assert {finding["check"] for finding in red} == {check}, red
    for finding in red:
        assert reason in finding["found"], finding
        assert finding["advice"] and remedy in finding["advice"], finding
    assert not [finding for finding in findings if finding["verdict"] == YELLOW], findings
    assert all(finding["advice"] is None for finding in findings if finding["verdict"] in (GREEN, SKIPPED))


def test_a_hanging_check_delays_no_other(clinic):
    """A broker that accepts connections and never answers becomes red in time; the other checks run meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        clinic.settings(celery={"broker_url": broker_url(clinic, port=server.getsockname()[1])})
        code, findings = clinic.examine("--timeout", "3s", "--site", clinic.deployment.destination_site)
    verdicts = {finding["check"]: finding["verdict"] for finding in findings}
    assert code == 1
    assert (verdicts["broker"], verdicts["queues"]) == (RED, SKIPPED)
    assert (verdicts["results"], verdicts["schema"], verdicts["write"]) == (GREEN, GREEN, GREEN)


def test_the_largest_package_that_waits_has_to_fit(clinic):
    clinic.settings(transfer={"free_space_margin": 1 << 60})
    clinic.deployment.package(size=3 * MB)
    clinic.deployment.package(size=MB)
    _, findings = clinic.examine("--site", clinic.deployment.destination_site)
    (space,) = [finding for finding in findings if finding["check"] == "space"]
    assert "the largest package that waits has 3 MiB" in space["found"], space


def test_stopped_by_a_signal(clinic):
    """It ends at once, with a shell's exit code for the signal, and ends its children."""
    sleep = clinic.deployment.directory / "ssh"
    sleep.write_text("#!/bin/sh\nexec sleep 60\n")
    sleep.chmod(0o755)
    clinic.settings(ssh={"program": str(sleep)})
    doctor = Process(
        [service("CCAT_TRANSFER_BIN"), "--config", clinic.deployment.config, "doctor"],
        clinic.deployment.directory / "doctor.log",
        cwd=clinic.deployment.directory,
        env=clean_environment(),
    )
    children = until(lambda: descendants(doctor.pid), "ssh runs")
    doctor.signal(signal.SIGTERM)
    assert doctor.ended(5) == 143
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()], "ssh is gone")


def test_an_unknown_site_is_reported(clinic):
    clinic.settings()
    code, findings = clinic.examine("--site", "nowhere")
    (red,) = [finding for finding in findings if finding["verdict"] == RED]
    assert (code, red["subject"]) == (1, "nowhere")
    assert clinic.deployment.origin_site in red["advice"]


def test_differing_versions_are_yellow(clinic):
    """Two releases of bbcp work together, with a warning."""
    other = clinic.deployment.directory / "other-bbcp"
    other.write_text("#!/bin/sh\necho 15.02.03.01.1\n")
    other.chmod(0o755)
    clinic.settings(bbcp={"remote_program": str(other)})
    code, findings = clinic.examine()
    (yellow,) = [finding for finding in findings if finding["verdict"] != GREEN]
    assert (code, yellow["check"], yellow["verdict"]) == (0, "remote_bbcp", YELLOW)
    assert "15.02.03.01.1" in yellow["found"] and "same version" in yellow["advice"]
