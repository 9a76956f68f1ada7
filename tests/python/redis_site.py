"""Parts of the tests of Redis as the broker: settings, and what its database contains."""

import contextlib
import json
import uuid

from celery import Celery

from brokers import RedisBroker
from support import until

#: Options of Python for workers that return messages of others after three seconds.
SWEEPING = {"broker_transport_options": RedisBroker.transport_options}


def options(transport=RedisBroker.transport_options, **more):
    """Keys of [celery] for a worker with options of the transport; by default messages return after three seconds."""
    return {f"broker_transport_options__{k}": json.dumps(v).strip('"') for k, v in transport.items()} | more


@contextlib.contextmanager
def app_of(broker, backend=None, **settings):
    with Celery(broker=broker.url, backend=backend or broker.url, set_as_current=False) as app:
        app.conf.update(settings)
        yield app


def starts(seen, result):
    """Number of times that a task has started, according to the events."""
    return sum(event["type"] == "task-started" and event.get("uuid") == result.id for event in seen)


def queue_name():
    return f"r{uuid.uuid4().hex[:8]}"


def held(broker, prefix=""):
    """Number of messages that workers hold, in both keys."""
    return broker.client.hlen(f"{prefix}unacked"), broker.client.zcard(f"{prefix}unacked_index")


def nothing_is_held(broker):
    until(lambda: held(broker) == (0, 0), "nothing is held")


def is_running(result):
    return result.state in ("STARTED", "PROGRESS")


def received(worker):
    """The ids of the tasks that a worker of ours has received, according to its log."""
    return {json.loads(line)["task_id"] for line in worker.log().splitlines() if '"task received"' in line}
