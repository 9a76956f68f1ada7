"""Outages of the broker. These tests stop and start the private RabbitMQ, or a Redis of their own."""

import signal

import pytest
from celery import Celery

from support import MB, TRANSFER, backend_url, held, tasks_worker

pytestmark = pytest.mark.timeout(150)

BROKERS = ["rabbitmq", "own-redis"]


@pytest.fixture(autouse=True)
def broker_is_up_again(broker):
    yield
    broker.power("start")


def test_restart_in_mid_copy(deployment, broker):
    """The copy continues, the redelivery joins it, and the result arrives."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=10 * MB)
    worker = deployment.worker()
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        copying = set(deployment.bbcp_processes())
        # Held for a long time, or else it may end before the broker is back on a slow machine.
        with held(copying):
            broker.power("restart")
            worker.says("connected to the broker again")
            assert copying and copying <= set(deployment.bbcp_processes()), "the copy went on"
        assert deployment.status(transfer) == "IN_PROGRESS"
        assert result.get(timeout=60) is None
    deployment.assert_moved(transfer)
    broker.all_settled(deployment.queue)
    assert len(deployment.copies()) == 1
    assert deployment.outcomes(transfer) == ["completed"]
    assert worker.running()


def test_worker_and_manager_before_the_broker(deployment, broker):
    """A worker waits for its broker; a manager that cannot send leaves the rows PENDING and logs this."""
    transfers = [deployment.package() for _ in range(3)]
    broker.power("stop")
    done = deployment.cli("manager", "--once", check=False, timeout=90)
    assert done.returncode == 5, done
    assert "broker" in done.stderr.lower() or broker.url.partition(":")[0] in done.stderr.lower()
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    for transfer in transfers:
        row = deployment.row(transfer)
        assert (row["status"], row["retry_count"]) == ("PENDING", 0)

    worker = deployment.worker(ready=False).says("no connection to the broker")
    broker.power("start")
    worker.says("worker ready", 40)
    deployment.schedule()
    for transfer in transfers:
        deployment.reaches(transfer, "COMPLETED")
    for transfer in transfers:
        deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 3


def test_lost_connection(deployment, broker):
    """The broker closes the connection, as it does when `consumer_timeout` is over."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=10 * MB)
    worker = deployment.worker()
    with deployment.app() as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        broker.close_connections()
        worker.says("connected to the broker again")
        assert result.get(timeout=60) is None
    deployment.assert_moved(transfer)
    broker.all_settled(deployment.queue)
    assert len(deployment.copies()) == 1


def test_a_shutdown_does_not_wait_for_the_broker(tmp_path, broker):
    """A worker stops in time although the callback of an ended task cannot be sent. The message of the task returns to
    its queue, and the next worker sends the callback."""
    queue = "callbacks_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), task_acks_late="true", **broker.worker_settings)
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    try:
        callback = app.signature("tasks.add", [3], queue=queue)
        result = app.send_task("tasks.sleep", [1], queue=queue, link=callback)
        worker.says("task received")
        # The task is frozen meanwhile; otherwise it may end before the broker of a slow machine is down.
        with held([worker.pid]):
            broker.power("stop")
        worker.signal(signal.SIGTERM)
        assert worker.ended(30) == 0
        broker.power("start")
        assert not result.ready()
        worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), task_acks_late="true", **broker.worker_settings)
        result.get(timeout=60)
        broker.all_settled(queue)
    finally:
        worker.stop()
        app.close()
        broker.power("start")
        broker.delete(queue)


def test_a_task_that_ends_without_a_broker_runs_once(tmp_path, broker):
    """Its message is delivered again, and joins the task that has ended."""
    queue = "ended_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"))
    try:
        with Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False) as app:
            result = app.send_task("tasks.sleep", [2], queue=queue)
            worker.says("task received")
            # The task is frozen meanwhile; otherwise it may end before the broker of a slow machine is down.
            with held([worker.pid]):
                broker.power("stop")
            worker.says("task succeeded")
            assert result.get(timeout=5) == 2
            broker.power("start")
            if not broker.url.startswith("redis"):
                # With Redis the worker settles it when it is connected again.
                worker.says("task has ended, but its message could not be settled", 40)
            broker.all_settled(queue)
            assert app.send_task("tasks.echo", [1], queue=queue).get(timeout=20) == 1
            assert worker.log().count("task succeeded") == 2
    finally:
        worker.stop()
        broker.power("start")
        broker.delete(queue)
