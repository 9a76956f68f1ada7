"""A transfer runs once, for any number of deliveries and any end of its worker."""

import signal
import uuid

import pytest
import redis

from support import MB, TRANSFER, service, until

BROKERS = ["rabbitmq", "redis"]


def test_five_times_the_same_message(deployment, broker):
    """The same message, id and all, five times at once and once more later: one copy."""
    deployment.double(RATE=2 * MB)
    transfer = deployment.package(size=2 * MB)
    task_id = str(uuid.uuid4())
    with deployment.app() as app:
        # Sent before a worker starts, so that all five are delivered at once.
        results = [app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id=task_id) for _ in range(5)]
        deployment.worker(concurrency=5)
        assert results[0].get(timeout=30) is None
        deployment.assert_moved(transfer)
        app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id=task_id)
        broker.all_settled(deployment.queue)
        assert results[0].state == "SUCCESS"
    deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 1
    assert deployment.outcomes(transfer) == ["completed"]
    assert deployment.row(transfer)["retry_count"] == 0


def test_five_tasks_for_the_same_transfer(deployment, broker):
    """Five independent tasks for one transfer, at two workers: one copy, and a later task succeeds."""
    deployment.double(RATE=2 * MB)
    transfer = deployment.package(size=2 * MB)
    with deployment.app() as app:
        for _ in range(5):
            app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.worker(concurrency=3, name="one")
        deployment.worker(concurrency=3, name="two")
        deployment.reaches(transfer, "COMPLETED")
        broker.all_settled(deployment.queue)
        later = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        assert later.get(timeout=30) is None
    deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 1
    assert deployment.row(transfer)["retry_count"] == 0


def test_two_callers_with_one_task_id(deployment):
    """Three calls with one id, two of them the same by two callers: two copies, and an answer for each caller."""
    deployment.settings(backend="rpc")
    deployment.double(RATE=2 * MB)
    first, other = deployment.package(size=2 * MB), deployment.package()
    task_id = str(uuid.uuid4())
    with deployment.app("rpc") as one, deployment.app("rpc") as two, deployment.app("rpc") as three:
        calls = {one: first, two: first, three: other}
        results = [app.send_task(TRANSFER, [id], queue=deployment.queue, task_id=task_id) for app, id in calls.items()]
        deployment.worker(concurrency=3)
        assert [result.get(timeout=30) for result in results] == [None] * 3
    for transfer in first, other:
        deployment.assert_moved(transfer)
        assert deployment.outcomes(transfer) == ["completed"]
    assert len(deployment.copies()) == 2


def test_killed_in_mid_copy(deployment, broker):
    """kill -9 and a restart: one COMPLETED row, one good file, nothing else."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=20 * MB)
    worker = deployment.worker()
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        worker.kill()
        assert deployment.status(transfer) == "IN_PROGRESS"
        deployment.double()
        deployment.worker(name="next")
        assert result.get(timeout=60) is None
    # A copy ends with its worker, perhaps a moment later.
    deployment.no_bbcp_left()
    until(lambda: not deployment.temporary_files(), "no temporary file is left")
    deployment.assert_moved(transfer)
    assert [path for path in deployment.destination.rglob("*") if path.is_file()] == [
        deployment.destination / deployment.row(transfer)["relative_path"]
    ]
    row = deployment.row(transfer)
    assert row["retry_count"] == 0
    assert deployment.outcomes(transfer)[-1] == "completed"
    broker.all_settled(deployment.queue)


def test_sigterm_lets_the_copy_finish(deployment, broker):
    """Warm shutdown: the running copy succeeds, the waiting message stays for another worker, exit code 0."""
    deployment.double(RATE=2 * MB)
    running, waiting = deployment.package(size=4 * MB), deployment.package()
    worker = deployment.worker(concurrency=1)
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [running], queue=deployment.queue)
        deployment.mid_copy()
        worker.signal(signal.SIGTERM)
        worker.says("worker stops")
        app.send_task(TRANSFER, [waiting], queue=deployment.queue)
        worker.signal(signal.SIGTERM)  # a second one changes nothing
        assert worker.ended() == 0
        assert result.get(timeout=5) is None
    deployment.assert_moved(running)
    assert broker.ready(deployment.queue) == 1
    assert deployment.row(waiting)["status"] == "PENDING"


def test_prefetched_messages_return_to_the_queue(deployment, broker):
    """A message that the worker holds but has not begun returns to the queue."""
    deployment.double(RATE=2 * MB)
    deployment.settings(celery={"worker_prefetch_multiplier": 4})
    transfers = [deployment.package(size=4 * MB), deployment.package(), deployment.package()]
    worker = deployment.worker(concurrency=1)
    with deployment.app() as app:
        for transfer in transfers:
            app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        until(lambda: broker.ready(deployment.queue) == 0, "the worker holds all three")
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0
        assert broker.ready(deployment.queue) == 2
        deployment.worker(name="next")
        for transfer in transfers:
            deployment.reaches(transfer, "COMPLETED")
    for transfer in transfers:
        deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 3


COLD = {
    "QUIT": [signal.SIGQUIT],
    "TERM, QUIT": [signal.SIGTERM, signal.SIGQUIT],
    "INT, INT": [signal.SIGINT, signal.SIGINT],
}


@pytest.mark.parametrize("signals", COLD)
def test_cold_stop(deployment, broker, signals):
    """The copy is stopped, the row and the message go back, and no retry is used up."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=30 * MB)
    worker = deployment.worker(concurrency=1)
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        assert deployment.bbcp_processes()
        for n, number in enumerate(COLD[signals]):
            if n:
                worker.says("worker stops")
                assert deployment.bbcp_processes(), "the copy goes on after the first signal"
            worker.signal(number)
        code = worker.ended(10)
        assert deployment.bbcp_processes() == []
        if signals != "INT, INT":
            assert code == 0
        assert result.state in ("STARTED", "PROGRESS", "PENDING")

        row = deployment.row(transfer)
        assert row["status"] in ("PENDING", "SCHEDULED")
        assert row["retry_count"] == 0
        assert deployment.leases() == []
        assert deployment.outcomes(transfer) == ["interrupted"]
        assert deployment.temporary_files() == []
        until(lambda: broker.ready(deployment.queue) == 1, "the message is back", 5)

        # The next worker runs it.
        deployment.double()
        deployment.worker(name="next")
        assert result.get(timeout=30) is None
    deployment.assert_moved(transfer)
    assert deployment.outcomes(transfer) == ["interrupted", "completed"]
    assert deployment.row(transfer)["retry_count"] == 0


def test_one_sigint_is_warm(deployment, broker):
    """As in Python: the copy finishes, and the exit code is 1."""
    deployment.double(RATE=2 * MB)
    transfer = deployment.package(size=4 * MB)
    worker = deployment.worker()
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        worker.signal(signal.SIGINT)
        assert worker.ended() == 1
        assert result.get(timeout=5) is None
    deployment.assert_moved(transfer)


def test_a_stalled_copy_is_stopped(deployment, broker):
    """No byte for stall_timeout: the copy is stopped, even if it ignores SIGTERM, and counts as a failure."""
    deployment.settings(transfer={"stall_timeout": "4s"})
    deployment.double(PLAN="stall@50%")
    transfer = deployment.package(size=2 * MB)
    deployment.worker()
    with deployment.app() as app, pytest.raises(Exception) as raised:
        app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30)
    assert type(raised.value).__name__ == "NetworkError"
    deployment.no_bbcp_left(5)
    row = deployment.row(transfer)
    assert (row["status"], row["retry_count"]) == ("PENDING", 1)
    assert deployment.temporary_files() == []


def test_heartbeats(deployment):
    """CCAT's monitors find a key for the worker while it runs, and one for each running task."""
    client = redis.Redis.from_url(service("TEST_REDIS_URL"))
    name = f"worker-{deployment.origin_site}"
    health = {
        "redis_url": service("TEST_REDIS_URL"),
        "worker_name": name,
        "task_key": "running:{task_id}",
        "interval": "200ms",
        "ttl": "2s",
    }
    deployment.settings(health=health)
    deployment.double(RATE=MB)
    worker = deployment.worker()
    key = f"health:data_transfer:{name}"
    until(lambda: client.get(key) == b"alive", "the worker writes heartbeats")
    assert 0 < client.ttl(key) <= 2
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [deployment.package(size=3 * MB)], queue=deployment.queue)
        until(lambda: client.get(f"running:{result.id}") == b"alive", "so does the task")
        assert result.get(timeout=30) is None
        until(lambda: client.get(f"running:{result.id}") is None, "the task's key is gone")
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert client.get(key) is None
    client.close()
