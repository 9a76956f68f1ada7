"""`task_routes`: where a worker sends a task that names no queue itself. Each test runs with both kinds of worker."""

import json
import uuid

import pytest
from kombu import Connection, Exchange, Queue

from support import KINDS, Workers, until

BROKERS = ["rabbitmq"]
pytestmark = pytest.mark.timeout(120)

TAG = uuid.uuid4().hex[:8]
EXACT, PATTERN, DEFAULT = (f"{name}{TAG}" for name in ("exact", "pattern", "default"))
EXCHANGE, BOUND = f"exchange{TAG}", f"bound{TAG}"
ROUTES = {
    "tasks.named": EXACT,
    "tasks.*": {"queue": PATTERN},
    "other.exchange": {"exchange": EXCHANGE, "routing_key": "key"},
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    for queue in (EXACT, PATTERN, DEFAULT):
        broker.declare(queue)
    with Connection(broker.url) as connection:
        Queue(BOUND, Exchange(EXCHANGE, type="direct"), routing_key="key")(connection).declare()
    workers = Workers(
        tmp_path_factory.mktemp("routes"),
        broker,
        python={"task_routes": ROUTES, "task_default_queue": DEFAULT},
        rust={"task_routes": toml(ROUTES), "task_default_queue": DEFAULT},
        pool="solo",
    )
    yield workers
    workers.close()
    for queue in (EXACT, PATTERN, DEFAULT, BOUND):
        broker.delete(queue)


def toml(value):
    if isinstance(value, str):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task, queue", [
    ("tasks.named", EXACT),
    ("tasks.unnamed", PATTERN),
    ("other.task", DEFAULT),
    ("other.exchange", BOUND),
], ids=["by its name", "by a pattern", "by default", "by an exchange"])  # The queues have random names.
def test_a_callback_goes_to_the_queue_of_its_route(workers, kind, task, queue):
    callback = workers.app.signature(task)
    workers.send(kind, "echo", 5, link=callback)
    message = until(lambda: workers.broker.get(queue), f"{task} in {queue}")
    body, headers, _ = message
    assert (headers["task"], body[0]) == (task, [5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_that_the_message_names_precedes_the_route(workers, kind):
    workers.send(kind, "echo", 6, link=workers.app.signature("tasks.named", queue=DEFAULT))
    body, *_ = until(lambda: workers.broker.get(DEFAULT), "the named queue")
    assert body[0] == [6]
