"""Secrets are read from files, and appear in no output. Also TLS to PostgreSQL, by libpq's modes.

Every service has its own password, which contains a mark. Worker, manager, doctor and commands that fail are run at level
trace, and everything that they print, write, store or pass to other programs is searched for the marks.
"""

import contextlib
import json
import os
import stat
import subprocess
import uuid
from pathlib import Path

import psycopg
import psycopg.sql
import pytest
import redis

from guarded import certificates, guarded_postgres, guarded_redis
from support import MB, Deployment, Process, clean_environment, descendants, service, until

# In passwords the marks are between characters that a URL has to encode.
MARKS = {name: f"{name}{uuid.uuid4().hex}" for name in ("broker", "redis", "postgres", "hook", "health", "collector")}


def password(name):
    """A password that a URL has to encode; for Redis a plain one, as Redis' settings, which also contain it, have no escapes."""
    return MARKS[name] if name == "redis" else f"p%40{MARKS[name]}/:@?x"


def found_in(text):
    """The marks in a text, in any encoding."""
    return [name for name, mark in MARKS.items() if mark in text]


class Guarded(Deployment):
    """A deployment whose services all require passwords."""

    def __init__(self, directory, bbcp, broker, tls, postgres_port, redis_port):
        self.tls, self.postgres_port, self.redis_port = tls, postgres_port, redis_port
        self.user = f"u{uuid.uuid4().hex[:8]}"
        broker.ctl("add_user", self.user, password("broker"))
        broker.ctl("set_permissions", "-p", "/", self.user, ".*", ".*", ".*")
        self.secrets = directory / "secrets"
        self.secrets.mkdir()
        self.files = {}
        contents = {name: password(name) for name in MARKS} | {
            "hook": f"http://127.0.0.1:1/{MARKS['hook']}",
            "health": f"redis://:{MARKS['health']}@127.0.0.1:{redis_port}/0",
            "collector": f"api-key={MARKS['collector']}",
        }
        for name, content in contents.items():
            self.files[name] = self.secrets / name
            self.files[name].write_text(content + "\n")
            self.files[name].chmod(0o600)
        super().__init__(directory, bbcp, broker)

    def settings(self, backend="redis", **sections):
        """All secrets in files; Redis has only one password, so that of `health` is wrong."""
        address = self.broker.url.rpartition("@")[2]
        secret = {
            "celery": {
                "broker_url": f"amqp://{self.user}@{address}",
                "broker_password_file": str(self.files["broker"]),
                "result_backend": f"redis://127.0.0.1:{self.redis_port}/0",
                "result_backend_password_file": str(self.files["redis"]),
            },
            "health": {"redis_url_file": str(self.files["health"]), "interval": "1s", "ttl": "5s"},
            # A port without a listener.
            "traces": {"endpoint": "http://127.0.0.1:1/v1/traces", "headers_file": str(self.files["collector"])},
            "notifications": {
                "webhook_url_file": str(self.files["hook"]),
                "command": ["sh", "-c", "env >notice; cat >>notice"],
            },
        }
        for section, keys in sections.items():
            secret[section] = secret.get(section, {}) | keys
        super().settings(backend, **secret)

    def ops_db(self):
        return {
            "database_type": "postgresql",
            "database_postgresql_database": "ops",
            "database_postgresql_user": "ccat",
            "database_postgresql_password_file": str(self.files["postgres"]),
            "database_postgresql_host": "localhost",
            "database_postgresql_port": self.postgres_port,
            "database_postgresql_sslmode": "verify-full",
            "database_postgresql_sslrootcert": str(self.tls / "ca.pem"),
        }

    def connection(self):
        address = {"host": "127.0.0.1", "port": self.postgres_port, "user": "ccat", "dbname": "ops"}
        return psycopg.connect(**address, password=self.files["postgres"].read_text().strip(), row_factory=psycopg.rows.dict_row)

    def rows(self, sql, *values):
        with self.connection() as connection:
            return connection.execute(sql.replace("?", "%s"), values).fetchall()

    def change_password(self, new):
        """Changes the password of PostgreSQL, and ends all sessions."""
        with self.connection() as connection:
            connection.execute(psycopg.sql.SQL("ALTER ROLE ccat PASSWORD {}").format(new))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'ccat' AND pid <> pg_backend_pid()")
        self.files["postgres"].write_text(new + "\n")

    def close(self):
        super().close()
        self.broker.ctl("delete_user", self.user)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, bbcp, broker):
    directory, tls = tmp_path_factory.mktemp("guarded"), tmp_path_factory.mktemp("tls")
    # PostgreSQL's user needs to traverse this directory to its own one.
    for folder in tls.parents:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    certificates(tls)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(guarded_postgres(tls, password("postgres")))
        redis_port = stack.enter_context(guarded_redis(tls, password("redis")))
        deployment = Guarded(directory, bbcp, broker, tls, postgres, redis_port)
        yield deployment
        deployment.close()


def look_into(pid):
    """Command line and environment of a process."""
    shown = ""
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            shown += Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b"\n").decode(errors="replace")
    return shown


def test_no_output_contains_a_secret(guarded):
    """Runs a transfer that succeeds and one that fails, a notice, a doctor, and monitors."""
    # All events of all targets, libraries included.
    loud = {"RUST_LOG": "trace,ccat_transfer=trace", "CCAT_DATA_TRANSFER_TRANSFER__MAX_RETRIES": 0}
    guarded.settings()
    guarded.double(RATE=2 * MB, PLAN="ok;refused", ACCEPT=0.1)
    transfers = [guarded.package(size=3 * MB), guarded.package()]
    pidfile = guarded.directory / "worker.pid"
    worker = Process(
        [service("CCAT_TRANSFER_BIN"), "--config", guarded.config, "worker", "-Q", guarded.queue, "-c", "1", "-E"]
        + ["-n", f"secrets-{guarded.origin_site}@%h", "--pidfile", pidfile],
        guarded.directory / "worker-secrets.log",
        cwd=guarded.directory,
        env=clean_environment(**loud),
    )
    guarded.processes.append(worker)
    worker.says("worker ready")
    manager = subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "--config", guarded.config, "manager", "--once", "--verbose"],
        env=clean_environment(**loud),
        cwd=guarded.directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert manager.returncode == 0, manager.stderr[-2000:]
    guarded.mid_copy()
    children = descendants(worker.pid)
    # The guard process, and bbcp's three processes.
    assert len(children) >= 4
    handed_on = "".join(map(look_into, [worker.pid, *children]))
    assert str(guarded.program) in handed_on

    with guarded.app() as app:
        inspect = app.control.inspect(timeout=3, limit=1)
        answers = json.dumps([inspect.conf(), inspect.report(), inspect.stats()], default=str)
    assert guarded.user in answers and "********" in answers

    states = {guarded.status(transfer) for transfer in transfers}
    until(lambda: {guarded.status(t) for t in transfers} == {"COMPLETED", "FAILED"}, f"both end, after {states}")
    worker.says("notice not delivered")
    worker.says("heartbeat could not be written")
    worker.says("traces were not accepted")
    until(lambda: "PATH=" in (guarded.directory / "notice").read_text(), "the program for notices has run")
    doctor = guarded.cli("doctor", "--json", check=False)
    red = [finding for finding in json.loads(doctor.stdout)["checks"] if finding["verdict"] == "red"]
    assert [finding["check"] for finding in red] == ["health"], red

    store = redis.Redis(port=guarded.redis_port, password=password("redis"))
    results = b"".join(store.get(key) for key in store.scan_iter("celery-task-meta-*"))
    assert b"FAILURE" in results and b"SUCCESS" in results
    rows = [guarded.rows(f"SELECT * FROM {table}") for table in ("data_transfer", "transfer_worker_attempt")]
    logs = "".join(path.read_text(errors="replace") for path in (guarded.directory / "logs").rglob("*") if path.is_file())
    assert guarded.program.name in logs
    texts = {
        "the worker's log": worker.log(),
        "the manager": manager.stdout + manager.stderr,
        "command lines and environments": handed_on,
        "celery inspect": answers,
        "doctor": doctor.stdout + doctor.stderr,
        "results": results.decode(),
        "the database": str(rows),
        "bbcp's logs": logs,
        "the pid file": pidfile.read_text(),
        "the program for notices": (guarded.directory / "notice").read_text(),
        "config check": guarded.cli("config", "check") + guarded.cli("config", "check", "--json"),
    }
    assert {where: found_in(text) for where, text in texts.items() if found_in(text)} == {}
    worker.stop()


FAILURES = {
    # Wrong settings, and the commands that fail because of them.
    "broker": (
        {"celery": {"broker_url": "amqp://u:{broker}@127.0.0.1:1//", "broker_connection_retry_on_startup": False}},
        [["worker", "-Q", "none"]],
    ),
    "brokers": (
        {
            "celery": {
                "broker_url": "amqp://u:{broker}@127.0.0.1:1//;pyamqp://u:{broker}@[::1]:1//;amqp://u:{broker}@ADDRESS//",
                "broker_connection_retry_on_startup": False,
            }
        },
        [["worker", "-Q", "none"]],
    ),
    "login": (
        {"celery": {"broker_url": "amqp://u:{broker}@ADDRESS//", "broker_connection_retry_on_startup": False}},
        [["worker", "-Q", "none"]],
    ),
    "broker-url": ({"celery": {"broker_url": "amqp://u:{broker}@h:port//"}}, [["config", "check"]]),
    "cut-off": ({"celery": {"broker_url": "amqp://u:1#{broker}@h//", "result_backend": "redis://:1/{redis}@h/0"}}, [["config", "check"]]),
    "parameter": ({"celery": {"broker_url": "amqp://h//?{broker}=1", "result_backend": "redis://h/0?x={redis}"}}, [["config", "check"]]),
    "backend-database": ({"celery": {"result_backend": "db+postgresql://u:{postgres}@127.0.0.1:1/d?sslpassword={redis}"}}, []),
    "health-url": ({"health": {"redis_url_file": "", "redis_url": "redis://:{health}@h:port/0"}}, [["config", "check"]]),
    "no-url": ({"celery": {"broker_url": "{broker}", "result_backend": "{redis}"}}, [["config", "check"]]),
    "results": ({"celery": {"result_backend": "redis://:{redis}@127.0.0.1:1/0"}}, []),
    "kind-of-results": ({"celery": {"result_backend": "mongodb://u:{redis}@h/"}}, [["config", "check"]]),
    "database": (
        {"ops_db": {"database_postgresql_password_file": "", "database_postgresql_password": "{postgres}"}},
        [["db", "status"], ["transfers", "list"]],
    ),
    "both": ({"ops_db": {"database_postgresql_password": "{postgres}"}}, [["config", "check"]]),
    "webhook": ({"notifications": {"webhook_url_file": "", "webhook_url": "{hook}"}}, [["config", "check"]]),
    "headers": ({"traces": {"headers_file": "", "headers": "{collector}"}}, [["config", "check"]]),
    "unknown-key": ({"ops_db": {"database_postgresql_pasword": "{postgres}"}}, [["config", "check"]]),
    "kind-of-value": ({"health": {"redis_url_file": "", "redis_url": ["{health}"]}}, [["config", "check"]]),
}


def filled(value):
    """Replaces names by marks, and inserts the address of the broker."""
    if isinstance(value, dict):
        return {key: filled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return value.replace("ADDRESS", service("TEST_AMQP_URL").rpartition("@")[2].partition("/")[0]).format(**MARKS)


@pytest.mark.parametrize("name", FAILURES)
def test_failures_contain_no_secret(guarded, name):
    """Wrong passwords, wrong URLs, wrong types: neither the error nor doctor's finding contains a secret."""
    settings, commands = FAILURES[name]
    sections = filled(settings)
    if any(key in sections.get("celery", {}) for key in ("broker_url", "result_backend")):
        sections["celery"] |= {"broker_password_file": "", "result_backend_password_file": ""}
    guarded.settings(**sections)
    for command in [*commands, ["doctor", "--skip", "limits"]]:
        done = guarded.cli(*command, "--loglevel", "trace", check=False)
        assert done.returncode != 0, command
        assert (done.stdout + done.stderr).strip()
        assert found_in(done.stdout + done.stderr) == [], command


def test_a_syntax_error_does_not_show_the_line(guarded):
    guarded.config.write_text(f'[ops_db]\ndatabase_postgresql_password = "{MARKS["postgres"]}\n')
    done = guarded.cli("config", "check", check=False)
    assert done.returncode == 4 and "line 2" in done.stderr
    assert found_in(done.stderr) == []


def test_a_secret_file_readable_by_all_causes_a_warning(guarded):
    """It works; worker and manager warn once, and so do `config check` and doctor."""
    guarded.settings()
    guarded.files["broker"].chmod(0o644)
    try:
        manager = guarded.cli("manager", "--once", check=False).stderr
        doctor = json.loads(guarded.cli("doctor", "--json", "--skip", "health"))
        check = guarded.cli("config", "check", check=False).stderr
    finally:
        guarded.files["broker"].chmod(0o600)
    assert manager.count("secret is exposed") == 1 and "celery.broker_password_file" in manager
    # The collector of traces is not reachable, either.
    (yellow,) = [finding for finding in doctor["checks"] if finding["verdict"] == "yellow" and finding["check"] != "traces"]
    assert yellow["check"] == "settings" and "chmod o=" in yellow["advice"]
    assert "mode 644" in check


def test_a_wrong_database_password(guarded):
    """Doctor reports the login, and nothing else is red."""
    guarded.settings(ops_db={"database_postgresql_password_file": "", "database_postgresql_password": "wrong"})
    findings = json.loads(guarded.cli("doctor", "--json", "--skip", "health", check=False).stdout)["checks"]
    (red,) = [finding for finding in findings if finding["verdict"] == "red"]
    assert red["check"] == "database" and "password authentication failed" in red["found"]
    assert "_password" in red["advice"]


PLAIN = {"database_postgresql_user": "plain"}
CARD = {"database_postgresql_user": "carded", "database_postgresql_password_file": ""}


@pytest.mark.parametrize(
    ("mode", "authority", "more", "works"),
    [
        ("disable", "", PLAIN, True),
        ("disable", "", {}, False),
        ("prefer", "", {}, True),
        # The server offers TLS, with which `plain` may not log in; libpq then tries without TLS, sqlx does not.
        ("require", "", PLAIN, False),
        ("require", "", {}, True),
        ("require", "other-ca.pem", {}, False),
        ("verify-ca", "ca.pem", {"database_postgresql_host": "127.0.0.1"}, True),
        ("verify-ca", "other-ca.pem", {}, False),
        ("verify-ca", "", {}, False),
        ("verify-full", "ca.pem", {}, True),
        ("verify-full", "ca.pem", {"database_postgresql_host": "127.0.0.1"}, False),
        ("verify-full", "ca.pem", CARD, False),
        ("verify-full", "ca.pem", CARD | {"card": True}, True),
    ],
)
def test_tls_to_postgresql(guarded, mode, authority, more, works):
    tls, more = guarded.tls, dict(more)
    if more.pop("card", False):
        more |= {
            "database_postgresql_sslcert": str(tls / "client.pem"),
            "database_postgresql_sslkey": str(tls / "client.key"),
        }
    guarded.settings(
        ops_db=guarded.ops_db()
        | {
            "database_postgresql_sslmode": mode,
            "database_postgresql_sslrootcert": authority and str(tls / authority),
        }
        | more
    )
    done = guarded.cli("db", "status", "--json", check=False)
    assert (done.returncode == 0) == works, done.stderr
    assert works or "postgresql://" in done.stderr


def test_a_copy_outlives_its_lease_its_log_and_a_password(guarded):
    """As in a copy of several days: many renewals, a rotated log file, then another password of the database."""
    guarded.settings(transfer={"resume_above": 1, "lease_renew_interval": "200ms"})
    guarded.double(RATE=MB)
    worker = guarded.worker(1, flags=("-f", "long-copy.log"), ready=False)
    log = guarded.directory / "long-copy.log"
    until(lambda: log.exists() and "worker ready" in log.read_text(), "the worker is ready")
    transfer = guarded.package(size=12 * MB)
    guarded.schedule()
    guarded.mid_copy()
    renewals = set()

    def is_renewed():
        renewals.update(lease["renewed_at"] for lease in guarded.leases())
        return len(renewals) > 5

    until(is_renewed, "the lease is renewed")
    log.rename(guarded.directory / "long-copy.log.1")
    until(log.exists, "the worker makes a new log file")

    old, new = password("postgres"), f"{MARKS['postgres']}-new"
    guarded.change_password(new)
    try:
        until(lambda: "could not be renewed; the copy continues" in log.read_text(), "the worker notices")
        copied = guarded.copied()
        until(lambda: guarded.copied() > copied, "the copy continues")
        # A regular stop would wait for half a minute to write to the database.
        worker.kill()
        guarded.double()
        other = guarded.worker(1, name="other")
        guarded.reaches(transfer, "COMPLETED")
        guarded.assert_moved(transfer)
        assert "resuming the partial copy" in other.log()
    finally:
        guarded.change_password(old)
