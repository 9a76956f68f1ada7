"""A message that two workers receive: only one of them stores the result."""

import os
import signal

import pytest

from proxy import Proxy
from support import MB, TRANSFER, service, until
from variants import OwnBbcp

pytestmark = pytest.mark.timeout(120)

BROKERS = ["rabbitmq", "redis"]


@pytest.fixture
def deployment(tmp_path, bbcp, broker):
    deployment = OwnBbcp(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


@pytest.mark.parametrize("wakes", ["in mid-copy", "after the end"])
def test_a_frozen_worker_leaves_the_result_to_the_next(deployment, broker, wakes):
    """A worker is frozen for longer than its lease. Another one gets its message and the transfer. The first one
    stores no result, sends no errback and no event of a failure."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=3 * MB)
    frozen = deployment.worker(concurrency=1, name="frozen")
    errbacks = f"{deployment.queue}.errbacks"
    broker.declare(errbacks)
    try:
        with deployment.app() as app:
            errback = app.signature("tasks.errback", queue=errbacks)
            result = app.send_task(TRANSFER, [transfer], queue=deployment.queue, link_error=errback)
            deployment.mid_copy()
            os.kill(frozen.pid, signal.SIGSTOP)
            # This happens by itself after missing heartbeats, or after the visibility timeout.
            broker.redeliver(deployment.queue)
            other = deployment.worker(concurrency=1, name="other")
            other.says("copy started")
            if wakes == "after the end":
                deployment.reaches(transfer, "COMPLETED")
            os.kill(frozen.pid, signal.SIGCONT)
            # It notices that its lease is lost, or first that the other worker has removed its partial copy.
            frozen.says("transfer did not complete")
            frozen.says("task ignored")
            assert result.get(timeout=30) is None
        deployment.assert_moved(transfer)
        broker.all_settled(deployment.queue)
        assert broker.ready(errbacks) == 0
        assert "task failed" not in frozen.log() + other.log()
        assert deployment.outcomes(transfer) == ["interrupted", "completed"]
    finally:
        broker.delete(errbacks)


def test_a_shutdown_leaves_the_result_to_the_next_worker(deployment, broker):
    """A worker stops in time although the result backend is down and the result of a copy is not stored."""
    server = service("TEST_REDIS_URL").rpartition("/")
    host, _, port = server[0].rpartition("//")[2].partition(":")
    proxy = Proxy(host, int(port))
    behind = f"redis://{host}:{proxy.port}/{server[2]}"
    try:
        transfer = deployment.package(size=1000)
        with deployment.app() as app:
            worker = deployment.worker(concurrency=1, CELERY_RESULT_BACKEND=behind)
            proxy.pull()
            result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
            deployment.reaches(transfer, "COMPLETED")
            worker.says("result was not stored")
            worker.signal(signal.SIGTERM)
            assert worker.ended(25) == 0
            until(lambda: broker.ready(deployment.queue) == 1, "the message is back")
            assert not result.ready()
            deployment.worker(concurrency=1, name="next")
            assert result.get(timeout=30) is None
        broker.all_settled(deployment.queue)
        assert len(deployment.copies()) == 1
        assert deployment.outcomes(transfer) == ["completed"]
    finally:
        proxy.close()
