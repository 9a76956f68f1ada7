"""The manager: from PENDING to a message in the right queue, and after a failure."""

import signal
import sqlite3

from support import MB, TRANSFER, Deployment, Process, clean_environment, service, until

BROKERS = ["rabbitmq", "redis"]


def test_schedules_what_is_pending(deployment, broker):
    """Exactly one message for each transfer, in a form that Celery's own tools can show."""
    transfers = [deployment.package(), deployment.package()]
    deployment.schedule()
    assert {deployment.status(transfer) for transfer in transfers} == {"SCHEDULED"}
    deployment.schedule()
    assert broker.ready(deployment.queue) == 2, "the second pass finds nothing to do"

    seen = []
    while message := broker.get(deployment.queue):
        (args, kwargs, embed), headers, properties = message
        seen.append(kwargs.get("data_transfer_id", *args))
        assert headers["task"] == TRANSFER
        assert properties["content_type"] == "application/json"
        assert properties["delivery_mode"] == 2
        assert properties["correlation_id"] == headers["id"] == headers["root_id"]
        assert {"lang", "argsrepr", "kwargsrepr", "retries", "timelimit", "origin"} <= set(headers)
        assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}
    assert sorted(seen) == sorted(transfers)


def test_each_origin_has_its_own_queue(deployment, broker, tmp_path, bbcp):
    """The queue belongs to the origin: its name has the site's short name and the location's name."""
    directory = tmp_path / "other"
    directory.mkdir()
    other = Deployment(directory, bbcp, broker)
    try:
        other.package()
        other.schedule()
        assert (broker.ready(other.queue), broker.ready(deployment.queue)) == (1, 0)
    finally:
        other.close()


def test_a_failing_bbcp_is_retried_through_the_manager(deployment, broker):
    """PENDING with one more retry after each failure; after the limit FAILED with the reason."""
    deployment.double(PLAN="refused", ACCEPT=0.1)
    transfer = deployment.package()
    deployment.worker()
    for retries in (1, 2, 3):
        deployment.schedule()
        until(lambda: deployment.row(transfer)["retry_count"] == retries, f"retry {retries} is counted")
        deployment.reaches(transfer, "PENDING")
    deployment.schedule()
    deployment.reaches(transfer, "FAILED")
    row = deployment.row(transfer)
    assert "given up after 3 retries" in row["failure_error_message"]
    assert row["retry_count"] == 3
    assert deployment.outcomes(transfer) == ["retried"] * 3 + ["failed"]
    assert len(deployment.copies()) == 4

    deployment.schedule()
    broker.all_settled(deployment.queue)
    assert deployment.status(transfer) == "FAILED", "a failed transfer is not scheduled again"


def test_a_failure_then_success(deployment):
    deployment.double(PLAN="reset@30%;corrupt:5;ok")
    transfer = deployment.package(size=2 * MB)
    deployment.worker()
    for retries in (1, 2):
        deployment.schedule()
        until(lambda: deployment.row(transfer)["retry_count"] == retries, f"retry {retries} is counted")
    deployment.schedule()
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)
    assert deployment.outcomes(transfer) == ["retried", "retried", "completed"]


def test_one_bad_row_does_not_stop_the_others(deployment, broker):
    bad, good = deployment.package(), deployment.package()
    with sqlite3.connect(deployment.database, timeout=20) as connection:
        connection.execute("UPDATE data_transfer SET origin_location_id = 999 WHERE id = ?", (bad,))
    deployment.cli("manager", "--once", check=False)
    assert deployment.status(good) == "SCHEDULED"
    assert broker.ready(deployment.queue) == 1


def test_the_loop(deployment):
    """`ccat-transfer manager` and a worker on all queues of the site: no producer is needed."""
    transfer = deployment.package()
    program = [service("CCAT_TRANSFER_BIN"), "--config", deployment.config]
    for name, command in {
        "worker": ["worker", "--site", deployment.origin_site],
        "manager": ["manager"],
    }.items():
        deployment.processes.append(
            Process(
                program + command,
                deployment.directory / f"{name}.log",
                cwd=deployment.directory,
                env=clean_environment(),
            )
        )
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)
    later = deployment.package()
    deployment.reaches(later, "COMPLETED")
    for process in deployment.processes:
        process.signal(signal.SIGTERM)
    assert [process.ended() for process in deployment.processes] == [0, 0]


def test_signals_end_it_with_celerys_codes(deployment, broker):
    """TERM: 0, INT: 1. The same while it still waits for its servers, as in a worker."""
    running = (["manager"], {}, "pass finished")
    away = {"CCAT_DATA_TRANSFER_CELERY__BROKER_URL": f"{broker.url.partition(':')[0]}://127.0.0.1:1//"}
    waiting = (["manager", "--wait-for=300"], away, "waiting for a server")
    waiting_worker = (["worker", "--wait-for=300", "-Q", deployment.queue], away, "waiting for a server")
    started = []
    for command, environment, says in (running, waiting, waiting_worker):
        for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 1)):
            process = Process(
                [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, *command],
                deployment.directory / f"ended-by-{number}-{len(started)}.log",
                cwd=deployment.directory,
                env=clean_environment(**environment),
            )
            deployment.processes.append(process)
            started.append((process, says, number, code))
    for process, says, number, _ in started:
        process.says(says).signal(number)
    for process, _, _, code in started:
        assert process.ended() == code, process.log()


def test_a_dead_workers_transfer_is_recovered(deployment, broker):
    """The worker's message is lost, too: the manager finds the expired lease and schedules the transfer again."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=20 * MB)
    worker = deployment.worker()
    deployment.schedule()
    deployment.mid_copy()
    worker.kill()
    broker.redeliver(deployment.queue)
    until(lambda: broker.ready(deployment.queue), "the message is back")
    assert broker.get(deployment.queue)
    deployment.double()

    def recovered():
        deployment.schedule()
        return deployment.status(transfer) == "SCHEDULED"

    until(recovered, "the manager schedules it again")
    deployment.worker(name="next")
    deployment.reaches(transfer, "COMPLETED")
    deployment.no_bbcp_left()
    until(lambda: not deployment.temporary_files(), "no temporary file is left")
    deployment.assert_moved(transfer)
    assert deployment.row(transfer)["retry_count"] == 0
