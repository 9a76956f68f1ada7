"""A database that answers and refuses: no message is consumed, and work continues when the cause is corrected."""

import signal
import socket
import subprocess
import urllib.error
import urllib.request

import pytest

from support import MB, TRANSFER, clean_environment, service, until
from variants import OnPostgres

pytestmark = pytest.mark.timeout(120)

# Log message of a waiting worker.
WAITS = "the database refuses statements; waiting until this is corrected"


class WithARole(OnPostgres):
    """The worker has its own role, which an administrator can change; the tests use a superuser."""

    def __init__(self, directory, bbcp, broker):
        super().__init__(directory, bbcp, broker)
        self.role = self.database_name
        self.execute(f"CREATE ROLE {self.role} LOGIN")
        self.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {self.role}")
        self.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {self.role}")

    def ops_db(self):
        return super().ops_db() | {"acquire_timeout": "2s"}

    def worker(self, **options):
        return super().worker(**options, CCAT_DATA_TRANSFER_OPS_DB__DATABASE_POSTGRESQL_USER=self.role)

    def end_sessions(self):
        self.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ?", self.role)

    def close(self):
        super().close()
        self._administer(f"DROP ROLE {self.role}")


@pytest.fixture
def deployment(tmp_path, bbcp, broker):
    deployment = WithARole(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


def no_login(deployment):
    deployment.execute(f"ALTER ROLE {deployment.role} NOLOGIN")
    deployment.end_sessions()
    return lambda: deployment.execute(f"ALTER ROLE {deployment.role} LOGIN")


def no_table(deployment):
    deployment.execute("ALTER TABLE data_transfer RENAME TO renamed")
    return lambda: deployment.execute("ALTER TABLE renamed RENAME TO data_transfer")


def no_privilege(deployment):
    deployment.execute(f"REVOKE UPDATE ON data_transfer FROM {deployment.role}")
    return lambda: deployment.execute(f"GRANT UPDATE ON data_transfer TO {deployment.role}")


REFUSALS = [no_login, no_table, no_privilege]


def readiness(address):
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scheduled(deployment, app, transfers):
    """Makes rows and messages as the manager does."""
    for transfer in transfers:
        deployment.execute("UPDATE data_transfer SET status = 'SCHEDULED' WHERE id = ?", transfer)
    return [app.send_task(TRANSFER, [transfer], queue=deployment.queue) for transfer in transfers]


def assert_untroubled(deployment, worker, transfers):
    for transfer in transfers:
        deployment.reaches(transfer, "COMPLETED", 60)
        deployment.assert_moved(transfer)
        assert deployment.row(transfer)["retry_count"] == 0
        assert deployment.outcomes(transfer) == ["completed"]
    deployment.broker.all_settled(deployment.queue)
    assert "task failed" not in worker.log()


def results_of(deployment):
    """Stores results in the same database with the worker's role."""
    server = deployment.server
    return f"db+postgresql://{deployment.role}@{server.host}:{server.port}/{deployment.database_name}"


@pytest.mark.parametrize("refuse", ["no table", "no privilege"])
def test_no_result_is_lost(deployment, refuse):
    """The result database refuses while five tasks end: their messages are kept until it accepts the results."""
    deployment.settings(celery={"result_backend": results_of(deployment)})
    deployment.execute(f"GRANT CREATE ON SCHEMA public TO {deployment.role}")
    worker = deployment.worker(concurrency=5)
    transfers = [deployment.package(size=1000) for _ in range(6)]
    with deployment.app() as app:
        sent = scheduled(deployment, app, transfers[:1])
        until(lambda: deployment.rows("SELECT 1 FROM pg_tables WHERE tablename = 'celery_taskmeta'"), "the table is made")
        deployment.broker.all_settled(deployment.queue)
        # Otherwise a missing privilege would have no effect on the role.
        deployment.execute(f"ALTER TABLE celery_taskmeta OWNER TO {deployment.server.username}")
        grant = f"GRANT ALL ON celery_taskmeta TO {deployment.role}"
        if refuse == "no table":
            deployment.execute(grant)
            deployment.execute("ALTER TABLE celery_taskmeta RENAME TO renamed")
            correct = "ALTER TABLE renamed RENAME TO celery_taskmeta"
        else:
            correct = grant
        sent += scheduled(deployment, app, transfers[1:])
        worker.says("result was not stored")
        for transfer in transfers:
            deployment.reaches(transfer, "COMPLETED")
        assert deployment.broker.unsettled(deployment.queue) == 5
        deployment.execute(correct)
        deployment.broker.all_settled(deployment.queue)
    stored = deployment.rows("SELECT task_id, status FROM celery_taskmeta")
    assert {row["task_id"]: row["status"] for row in stored} == {result.id: "SUCCESS" for result in sent}


@pytest.mark.parametrize("refuse", REFUSALS)
def test_no_message_is_consumed(deployment, refuse):
    """One copy runs while the database refuses, and five rows wait for a worker."""
    deployment.double(RATE=MB)
    running, *waiting = [deployment.package(size=2 * MB if n == 0 else 1000) for n in range(6)]
    worker = deployment.worker(concurrency=2)
    with deployment.app() as app:
        results = scheduled(deployment, app, [running])
        deployment.mid_copy()
        for transfer in waiting:
            deployment.execute("UPDATE data_transfer SET status = 'SCHEDULED' WHERE id = ?", transfer)
        correct = refuse(deployment)
        results += [app.send_task(TRANSFER, [transfer], queue=deployment.queue) for transfer in waiting]
        worker.says(WAITS)
        worker.says("copy finished; verifying")
        # A failed message would have been settled and the next one delivered.
        until(lambda: deployment.broker.unsettled(deployment.queue) == 6, "all messages are there")
        assert not any(result.ready() for result in results)
        correct()
        assert [result.get(timeout=60) for result in results] == [None] * 6
    assert_untroubled(deployment, worker, [running, *waiting])
    reasons = [line for line in worker.log().splitlines() if WAITS in line]
    assert len(reasons) <= 20, "the reason is in the log, but not for each try"


def test_statements_of_a_changed_schema_are_prepared_again(deployment):
    """`cached plan must not change result type`: a column's type was changed while the worker ran."""
    worker = deployment.worker(concurrency=1)
    first, *later = [deployment.package(size=1000) for _ in range(6)]
    with deployment.app() as app:
        (result,) = scheduled(deployment, app, [first])
        assert result.get(timeout=30) is None
        deployment.execute("ALTER TABLE data_transfer_package ALTER COLUMN checksum TYPE varchar(300)")
        deployment.execute("ALTER TABLE transfer_worker_lease ALTER COLUMN phase TYPE varchar(300)")
        deployment.execute("ALTER TABLE data_transfer ALTER COLUMN failure_error_message TYPE varchar(3000)")
        results = scheduled(deployment, app, later)
        assert [result.get(timeout=30) for result in results] == [None] * 5
    assert "cached plan" in worker.log()
    assert_untroubled(deployment, worker, [first, *later])


def test_a_warm_shutdown_returns_the_messages(deployment):
    """A worker that waits for its database is not ready, stops at once on request, and another one does the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{}".format(free.getsockname()[1])
    worker = deployment.worker(concurrency=2, CCAT_DATA_TRANSFER_HTTP__LISTEN=address)
    until(lambda: readiness(address) == (200, "ready\n"), "the worker is ready")
    transfers = [deployment.package(size=1000) for _ in range(3)]
    correct = no_privilege(deployment)
    with deployment.app() as app:
        results = scheduled(deployment, app, transfers)
        worker.says(WAITS)
        until(lambda: readiness(address)[0] == 503, "the worker is not ready")
        assert "permission denied" in readiness(address)[1]
        worker.signal(signal.SIGTERM)
        assert worker.ended(9) == 0
        until(lambda: deployment.broker.ready(deployment.queue) == 3, "the messages are back")
        assert {deployment.status(transfer) for transfer in transfers} == {"SCHEDULED"}
        correct()
        other = deployment.worker(concurrency=2, name="other")
        assert [result.get(timeout=30) for result in results] == [None] * 3
    assert_untroubled(deployment, other, transfers)


def test_a_refused_value_fails_its_row_alone(deployment):
    """A row whose values the database refuses fails with a reason; other rows are not delayed."""
    worker = deployment.worker(concurrency=1)
    transfers = [deployment.package(size=1000) for _ in range(3)]
    bad = transfers[0]
    deployment.execute(
        f"ALTER TABLE data_transfer ADD CONSTRAINT odd CHECK (id <> {bad} OR status NOT IN ('IN_PROGRESS'))"
    )
    with deployment.app() as app:
        results = scheduled(deployment, app, transfers)
        with pytest.raises(Exception, match="violates check constraint"):
            results[0].get(timeout=30)
        assert [result.get(timeout=30) for result in results[1:]] == [None] * 2
    row = deployment.row(bad)
    assert row["status"] == "FAILED" and "violates check constraint" in row["failure_error_message"]
    for transfer in transfers[1:]:
        deployment.assert_moved(transfer)
    assert WAITS not in worker.log()


def test_the_manager_waits(deployment):
    """A pass that the database refuses leaves the rows PENDING, and the next pass sends them."""
    transfers = [deployment.package(size=1000) for _ in range(3)]
    correct = no_table(deployment)
    manager = deployment.cli("manager", "--once", check=False)
    assert manager.returncode != 0 and "panicked" not in manager.stderr
    correct()
    assert {deployment.status(transfer) for transfer in transfers} == {"PENDING"}
    deployment.schedule()
    worker = deployment.worker()
    assert_untroubled(deployment, worker, transfers)


def test_an_empty_database_names_what_to_do_next(tmp_path):
    database = tmp_path / "empty.sqlite"
    database.touch()
    done = subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "transfers", "list"],
        env=clean_environment(CCAT_OPS_DB_DATABASE_TYPE="sqlite", CCAT_OPS_DB_DATABASE_SQLITE_DATABASE=database),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 4, done.stderr
    assert "There is no ops-db." in done.stderr and "Alembic" not in done.stderr, done.stderr
    assert "run `ccat-transfer db migrate`" in done.stderr
