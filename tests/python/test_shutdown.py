"""A worker that is shut down beside one of Python: what becomes of its running tasks."""

import signal
import uuid

import pytest

from support import until
from test_canvas import record
from test_control import events, types
from test_tasks import ended, only

BROKERS = ["rabbitmq", "redis"]
pytestmark = pytest.mark.timeout(120)

COLD = {"QUIT": [signal.SIGQUIT], "INT, INT": [signal.SIGINT, signal.SIGINT]}


def stop_cold(worker, signals):
    for n, number in enumerate(COLD[signals]):
        if n:
            worker.says("worker stops")
        worker.signal(number)
    worker.ended(15)


class Errbacks:
    """Makes errbacks like test_canvas.record."""

    def __init__(self, app, broker):
        self.app, self.broker = app, broker


@pytest.mark.parametrize("signals", COLD)
def test_cold_shutdown_ends_tasks_acknowledged_early(tmp_path, broker, signals):
    """A final state, its event and its errback for a task that is stopped; SUCCESS for one that still returns."""
    with only(tmp_path, broker, "-c", "3", worker_soft_shutdown_timeout="0") as send:
        with record(Errbacks(send("echo", 1).app, broker)) as (signature, take):
            app = send("echo", 1).app
            with events(app) as seen:
                errback = signature("errback").set(immutable=True)
                stopped = send("early", link_error=errback)
                finished = send("early", 0.5)
                for result in stopped, finished:
                    until(lambda: result.state == "STARTED", "the task runs")
                stop_cold(send.worker, signals)
                assert ended(finished, 1)["result"] == "finished"
                end = ended(stopped, 1)
                assert end["status"] == "FAILURE"
                assert end["result"][:2] == ("celery.exceptions", "WorkerShutdown")
                until(lambda: "task-failed" in types(seen, uuid=stopped.id), "the event has come")
                until(lambda: "task-succeeded" in types(seen, uuid=finished.id), "the event has come")
                assert len(take(1)) == 1
