"""PgBouncer between this program and PostgreSQL: `session` mode works, `transaction` mode is refused with an explanation."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess

import pytest

from support import TRANSFER, clean_environment, until
from variants import OnPostgres

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        not PROGRAM and os.environ.get("TEST_SERVICES") != "required", reason="pgbouncer is not installed"
    ),
]

EXPLAINED = "a connection pooler gives each transaction another session"


@contextlib.contextmanager
def pgbouncer(directory, server, mode):
    """A pool in front of the private server; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = directory / f"pgbouncer-{mode}.ini"
    settings.write_text(
        f"""
[databases]
* = host={server.host} port={server.port} user={server.username}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
auth_type = any
pool_mode = {mode}
unix_socket_dir =
"""
    )
    # PgBouncer does not run as root.
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    with open(directory / f"pgbouncer-{mode}.log", "wb") as log:
        process = subprocess.Popen([PROGRAM, *user, settings], stdout=log, stderr=log, env=clean_environment())

    def answers():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True

    try:
        until(answers, "PgBouncer answers")
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)


@pytest.fixture
def deployment(tmp_path, bbcp, broker):
    deployment = OnPostgres(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


def results(deployment, port):
    return f"db+postgresql://{deployment.server.username}@127.0.0.1:{port}/{deployment.database_name}"


def test_by_transaction_is_refused(deployment, tmp_path):
    with pgbouncer(tmp_path, deployment.server, "transaction") as port:
        deployment.database_port = port
        deployment.settings()
        for command in (["db", "migrate"], ["db", "check"], ["manager", "--once"], ["worker"]):
            done = deployment.cli(*command, check=False)
            assert done.returncode == 4 and EXPLAINED in done.stderr, (command, done)
            assert "pool_mode = session" in done.stderr
        checked = deployment.cli("doctor", check=False)
        assert "pool_mode = session" in checked.stdout, checked
        # A result waits, with the reason in the log, until another backend is set.
        deployment.database_port = deployment.server.port
        deployment.settings(celery={"result_backend": results(deployment, port)})
        transfer = deployment.package(size=1000)
        worker = deployment.worker()
        deployment.schedule()
        deployment.reaches(transfer, "COMPLETED")
        worker.says("result was not stored")
        assert EXPLAINED in worker.log()


def test_by_session_works(deployment, tmp_path):
    with pgbouncer(tmp_path, deployment.server, "session") as port:
        deployment.database_port = port
        deployment.settings(celery={"result_backend": results(deployment, port)})
        deployment.cli("db", "migrate")
        transfers = [deployment.package(size=1000) for _ in range(3)]
        worker = deployment.worker()
        with deployment.app() as app:
            app.conf.result_backend = results(deployment, deployment.server.port)
            sent = [app.send_task(TRANSFER, [transfer], queue=deployment.queue) for transfer in transfers]
            for transfer in transfers:
                deployment.reaches(transfer, "COMPLETED")
            deployment.broker.all_settled(deployment.queue)
            stored = deployment.rows("SELECT task_id, status FROM celery_taskmeta")
        assert {row["task_id"]: row["status"] for row in stored} == {result.id: "SUCCESS" for result in sent}
        assert "cannot be" not in worker.log() and "refuse" not in worker.log()
        # Otherwise the pool's sessions could not be closed.
        worker.stop()
