"""Messages that would end a connection or the process: each is settled, and later messages run."""

import json
import signal
import time
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from support import backend_url, tasks_worker, until

BROKERS = ["rabbitmq", "redis"]

# A byte that is not UTF-8.
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


def send(broker, channel, queue, headers, body, **properties):
    properties = {"content_type": "application/json", "content_encoding": "utf-8"} | properties
    broker.send(channel, queue, body, headers, **properties)
    return headers["id"]


def logged(worker, task_id, message):
    lines = (json.loads(line) for line in worker.log().splitlines() if task_id in line)
    return any(line["message"] == message for line in lines)


def ran(worker, task_id):
    """Returns true if a task has succeeded."""
    return logged(worker, task_id, "task succeeded")


@pytest.mark.rabbitmq("texts of AMQP")
def test_names_that_are_not_utf8(tmp_path, broker, queue):
    """AMQP requires UTF-8 in short strings; RabbitMQ checks only names of exchanges, queues and routing keys."""
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
                sent.append(send(broker, channel, queue, headers, body, **properties))
            headers, body = task()
            sent.append(send(broker, channel, queue, headers | {ODD: 1, "inner": {ODD: [{ODD: None}]}}, body))
            headers, body = task()
            refused = send(broker, channel, queue, headers, body, content_type=ODD)
            # A valid message behind all of these.
            headers, body = task()
            sent.append(send(broker, channel, queue, headers, body))
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
    """Bodies above the limit do not reach the memory of the worker, which logs each size."""
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), "-c", "2", "--prefetch-multiplier", "50")
    try:
        with broker.channel() as channel:
            headers, _ = task()
            send(broker, channel, queue, headers, "x" * 4)  # memory that grows with the first message is allocated now
            broker.all_settled(queue)
            before = peak_mb(worker.pid)
            for _ in range(10):
                headers, _ = task()
                send(broker, channel, queue, headers, "x" * 20_000_000)
            headers, body = task()
            behind = send(broker, channel, queue, headers, body)
        until(lambda: ran(worker, behind), "what stands behind them is run", 60, log=worker.log)
        if broker.has_dead_letters:
            until(lambda: broker.ready(f"{queue}.dead") == 10, "they are dead-lettered")
            with broker.channel() as channel:
                assert len(channel.basic_get(f"{queue}.dead", no_ack=True).body) == 20_000_000
        broker.all_settled(queue)
        assert worker.log().count("body of 20000000 bytes is above celery.max_body_bytes (4194304)") == 10
        grown = peak_mb(worker.pid) - before
        print(f"\n{grown:.1f} MB more")
        assert grown < 10
    finally:
        worker.stop()


def in_future(**time):
    return (datetime.now(timezone.utc) + timedelta(**time)).isoformat()


# 4 MB that take 200 MB once they are decoded.
HEAVY = [1] * 2_000_000


def compact(args):
    return json.dumps([args, {}, {}], separators=(",", ":"))


def test_large_messages_with_an_eta(tmp_path, broker, queue):
    """Large messages with an `eta` stay with the broker, delay no later message, and run at their time."""
    count = 30
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), "-c", "2")
    try:
        with broker.channel() as channel:
            headers, _ = task("tasks.echo", eta=in_future(seconds=3))
            soon = send(broker, channel, queue, headers, compact([[1] * 20_000]))
            body = compact([HEAVY])
            for _ in range(count):
                headers, _ = task("tasks.echo", eta=in_future(days=365))
                send(broker, channel, queue, headers, body)
            headers, body = task()
            sent = time.monotonic()
            behind = send(broker, channel, queue, headers, body)
        until(lambda: ran(worker, behind), "what stands behind them is run", 60, log=worker.log)
        took = time.monotonic() - sent
        print(f"\nwaited for {took:.2f} s, {peak_mb(worker.pid):.0f} MB")
        until(lambda: ran(worker, soon), "the one that is due is run", log=worker.log)
        until(lambda: worker.log().count("stays with the broker") > count, "all have come", log=worker.log)
        until(lambda: broker.unsettled(queue) == count, "that one is settled")
        assert peak_mb(worker.pid) < 150
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0
    finally:
        worker.stop()
    # The broker still has them, complete.
    assert broker.ready(queue) == count
    with broker.channel() as channel:
        assert len(channel.basic_get(queue, no_ack=True).body) > 4_000_000


def peak_mb(pid):
    """Peak memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
