"""Queues and the connection: a long task, a silent broker, and a quorum queue."""

import json
import time
import types
import uuid

import pytest
from celery import Celery
from kombu import Exchange, Queue

from support import Process, backend_url, clean_environment, service, tasks_worker, until

pytestmark = pytest.mark.timeout(180)

BROKERS = ["rabbitmq", "own-redis"]

RECONNECTS = "no connection to the broker"


@pytest.fixture
def queue(broker):
    name = f"q{uuid.uuid4().hex[:8]}"
    yield name
    broker.delete(name)


@pytest.fixture
def app(broker):
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    yield app
    app.close()


@pytest.mark.rabbitmq("consumer_timeout")
def test_a_task_longer_than_consumer_timeout(tmp_path, broker, app, queue):
    """The broker closes one channel, delivers again, and the redelivery joins the running task."""

    def limit(timeout, check):
        for key, value in [("consumer_timeout", timeout), ("channel_tick_interval", check)]:
            broker.ctl("eval", f"application:set_env(rabbit, {key}, {value}).")

    limit(2000, 500)
    worker = None
    try:
        worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"))
        result = app.send_task("tasks.sleep", [7], queue=queue)
        worker.says("consumer_timeout")
        assert result.get(timeout=30) == 7
        worker.says("task succeeded")
        broker.all_settled(queue)
        log = worker.log()
        assert log.count("task succeeded") == 1
        assert log.count("the new delivery joins it") >= 1
        assert RECONNECTS not in log and "connected to the broker again" not in log
        # The worker still serves the queue.
        assert app.send_task("tasks.add", [1, 2], queue=queue).get(timeout=30) == 3
    finally:
        limit(1800000, 60000)
        if worker:
            worker.stop()


def test_a_silent_broker(tmp_path, broker, app, queue):
    """No byte arrives any more, and the connection is not closed: heartbeats, or replies that are late, detect the loss."""
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), broker_heartbeat=2)
    with broker.frozen():
        # Every connection has its own heartbeats; this is the relevant connection.
        lost = lambda line: RECONNECTS in line and '"purpose":"tasks"' in line
        until(lambda: any(map(lost, worker.log().splitlines())), "the loss is seen", 30)
    worker.says("connected to the broker again", 60)
    assert app.send_task("tasks.add", [1, 2], queue=queue).get(timeout=30) == 3
    worker.stop()


# ---------------------------------------------------------------- quorum queues


@pytest.fixture
def vhosts(broker):
    """Two virtual hosts, one for each worker: objects with `url`, like a broker, and `name`."""
    made = []
    for _ in range(2):
        name = f"v{uuid.uuid4().hex[:8]}"
        broker.ctl("add_vhost", name)
        broker.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        made.append(types.SimpleNamespace(name=name, url=broker.url.removesuffix("//") + f"/{name}"))
    yield made
    for vhost in made:
        broker.ctl("delete_vhost", vhost.name)


def topology(broker, vhost):
    """Every exchange, queue and binding that outlives the workers."""
    found = set()
    for command, *columns in [
        ("list_exchanges", "name", "type", "durable", "auto_delete", "arguments"),
        ("list_queues", "name", "durable", "auto_delete", "exclusive", "arguments"),
        ("list_bindings", "source_name", "destination_kind", "destination_name", "routing_key", "arguments"),
    ]:
        listed = broker.ctl(command, "-p", vhost.name, "--formatter", "json", *columns)
        for row in json.loads(listed):
            if isinstance(row.get("arguments"), list):
                row["arguments"].sort()  # their order has no meaning
            text = json.dumps(row, sort_keys=True)
            # Objects that belong to one worker only.
            if "pidbox" not in text and "celeryev" not in text:
                found.add(f"{command} {text}")
    return found


PYTHON_APP = """
import os
from celery import Celery
from kombu import Exchange, Queue
app = Celery("quorum_app", broker=os.environ["CELERY_BROKER_URL"])
app.conf.task_queues = [
    Queue("delayed", Exchange("delayed", type="topic"), routing_key="delayed", queue_arguments={"x-queue-type": "quorum"})
]
"""

TASK_QUEUES = '{delayed = {exchange_type = "topic", arguments = {"x-queue-type" = "quorum"}}}'


@pytest.mark.rabbitmq("quorum queues")
def test_delayed_delivery_as_python_lays_it_out(tmp_path, broker, vhosts):
    python_vhost, rust_vhost = vhosts
    (tmp_path / "quorum_app.py").write_text(PYTHON_APP)
    python = Process(
        [service("TEST_PYTHON"), "-m", "celery", "-A", "quorum_app", "worker", "-P", "solo", "-l", "INFO"],
        tmp_path / "python.log",
        cwd=tmp_path,
        env=clean_environment(CELERY_BROKER_URL=python_vhost.url),
    )
    rust = tasks_worker(tmp_path, "delayed", rust_vhost, backend_url("redis"), task_queues=TASK_QUEUES)
    python.says("ready.", 90)
    bound = '"source_name": "celery_delayed_delivery"'
    until(lambda: any(bound in line for line in topology(broker, python_vhost)), "Python's bindings", 60)
    expected = topology(broker, python_vhost)
    assert sum("list_queues" in line for line in expected) == 29
    made = topology(broker, rust_vhost)
    # Line by line, so that a failure shows the difference.
    for ours, theirs in zip(sorted(made - expected), sorted(expected - made), strict=True):
        assert ours == theirs
    python.stop()

    # A Python producer delays by the broker, so the worker holds no message meanwhile.
    app = Celery(broker=rust_vhost.url, backend=backend_url("redis"), set_as_current=False)
    app.conf.task_queues = [
        Queue(
            "delayed",
            Exchange("delayed", type="topic"),
            routing_key="delayed",
            queue_arguments={"x-queue-type": "quorum"},
        )
    ]
    began = time.monotonic()
    result = app.send_task("tasks.add", [1, 2], queue="delayed", countdown=3)
    time.sleep(1)
    assert result.id not in rust.log(), "the broker holds it"
    assert result.get(timeout=30) == 3
    assert time.monotonic() - began >= 2.9
    # A retry is delayed in the same way, and also a second one.
    retried = app.send_task("tasks.retry", [2, 2], queue="delayed")
    assert retried.get(timeout=40) == 2
    app.close()
    rust.stop()
