"""Messages that would end a connection, or more: each is settled, and what stands behind it runs."""

import json
import uuid
from pathlib import Path

import amqp
import pytest

from support import backend_url, tasks_worker, until

# A byte that is no UTF-8.
ODD = b"caf\x8d"


@pytest.fixture
def queue(broker):
    queue = f"hostile{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    yield queue
    broker.delete(queue)


def task(name="tasks.add", args=(1, 2), embed=None, **headers):
    """Headers and body of a task message."""
    headers = {"task": name, "id": str(uuid.uuid4()), "lang": "py"} | headers
    return headers, json.dumps([args, {}, embed or {}])


def send(channel, queue, headers, body, **properties):
    message = amqp.Message(body.encode(), application_headers=headers, content_type="application/json", content_encoding="utf-8")
    message.properties.update(properties)
    channel.basic_publish(message, exchange="", routing_key=queue)
    return headers["id"]


def ran(worker, task_id):
    """Whether a task has succeeded."""
    lines = (json.loads(line) for line in worker.log().splitlines() if task_id in line)
    return any(line["message"] == "task succeeded" for line in lines)


def test_short_strings_that_are_no_utf8(tmp_path, broker, queue):
    """AMQP says that they are UTF-8; RabbitMQ checks only the names of exchanges, queues and routing keys."""
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), "-c", "2")
    try:
        with broker.channel() as channel:
            sent = []
            for properties in (
                *({name: ODD} for name in ("message_id", "correlation_id", "reply_to", "type", "app_id", "cluster_id")),
                {"content_encoding": ODD},
                {},
            ):
                headers, body = task()
                sent.append(send(channel, queue, headers, body, **properties))
            headers, body = task()
            sent.append(send(channel, queue, headers | {ODD: 1, "inner": {ODD: [{ODD: None}]}}, body))
            headers, body = task()
            refused = send(channel, queue, headers, body, content_type=ODD)
            # Whatever these are, it stands behind them.
            headers, body = task()
            sent.append(send(channel, queue, headers, body))
        until(lambda: all(ran(worker, task_id) for task_id in sent), "every task is run", log=worker.log)
        until(lambda: broker.ready(f"{queue}.dead") == 1, "the one of an unknown content type is dead-lettered")
        assert not ran(worker, refused)
        broker.all_settled(queue)
        log = worker.log()
        assert "no connection to the broker" not in log and "parse error" not in log, log[-3000:]
        warnings = [line for line in log.splitlines() if "not UTF-8" in line]
        assert len(warnings) == 9, log[-3000:]
        assert all(queue in line for line in warnings)
    finally:
        worker.stop()


def test_bodies_above_the_limit(tmp_path, broker, queue):
    """They are left out as they arrive: the worker holds none of them, and says how large each was."""
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), "-c", "2", "--prefetch-multiplier", "50")
    try:
        with broker.channel() as channel:
            headers, _ = task()
            send(channel, queue, headers, "x" * 4)  # whatever grows with the first message has grown
            broker.all_settled(queue)
            before = peak_mb(worker.pid)
            for _ in range(10):
                headers, _ = task()
                send(channel, queue, headers, "x" * 20_000_000)
            headers, body = task()
            behind = send(channel, queue, headers, body)
        until(lambda: ran(worker, behind), "what stands behind them is run", 60, log=worker.log)
        until(lambda: broker.ready(f"{queue}.dead") == 10, "they are dead-lettered")
        assert worker.log().count("body of 20000000 bytes is above celery.max_body_bytes (4194304)") == 10
        assert peak_mb(worker.pid) < before + 10
        message = None
        with broker.channel() as channel:
            message = channel.basic_get(f"{queue}.dead", no_ack=True)
        assert len(message.body) == 20_000_000
    finally:
        worker.stop()


def peak_mb(pid):
    """The most memory that a process has had so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
