"""A worker with 512 MB of memory and everything that a sender can do to it: it is the same process at the end, and no ordinary
task has waited for long.

The limit is RLIMIT_DATA: what a process writes to, be it heap, stacks or other memory of its own. An allocation beyond it
fails, which ends the worker. (RLIMIT_AS would count what is only reserved as well.)
"""

import json
import resource
import time
import uuid
from pathlib import Path

import amqp
import pytest

from fates import Judge, received
from support import Process, backend_url, clean_environment, service, until
from test_fuzz import ACCEPT, TASKS, Fuzzer
from test_hostile import HEAVY, ODD, compact, in_future, ran, send, task

LIMIT_MB = 512
WITHIN = 2.0  # seconds


class Limited:
    """The worker, and how long ordinary tasks wait for it."""

    def __init__(self, directory, broker, queue):
        self.broker, self.queue, self.waits = broker, queue, {}
        size = LIMIT_MB << 20
        self.process = Process(
            [Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "tasks_worker"]
            + ["-Q", queue, "-n", f"limited-{queue}@%h", "-E", "-c", "2"],
            directory / "worker.log",
            cwd=directory,
            env=clean_environment(
                CELERY_BROKER_URL=broker.url,
                CELERY_RESULT_BACKEND=backend_url("redis"),
                CCAT_DATA_TRANSFER_CELERY__ACCEPT_CONTENT='["json", "msgpack", "yaml"]',
                CCAT_DATA_TRANSFER_LOG__FORMAT="json",
            ),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)),
        ).says("worker ready")

    def survives(self, what, publish, waiting=0):
        """Sends something, and an ordinary task behind it; the rest is settled but for what waits for its time."""
        with self.broker.channel() as channel:
            publish(channel)
            headers, body = task()
            sent = time.monotonic()
            behind = send(channel, self.queue, headers, body)
        self.until(lambda: ran(self.process, behind), f"{what}: the task behind it is run")
        self.waits[what] = time.monotonic() - sent
        self.until(lambda: self.broker.unsettled(self.queue) <= waiting, f"{what}: it is settled")

    def until(self, condition, what):
        def holds():
            assert self.process.running(), f"{what}: the worker has ended\n{self.process.log()[-3000:]}"
            return condition()

        until(holds, what, 60, log=self.process.log)


@pytest.fixture
def limited(tmp_path, broker):
    queue = f"limited{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    limited = Limited(tmp_path, broker, queue)
    yield limited
    limited.process.stop()
    broker.delete(queue)


def signature(number, size=500, **options):
    args = [number, [1] * size]
    return {"task": "tasks.add", "args": args, "kwargs": {}, "options": options, "subtask_type": None, "immutable": True}


def compound(kind, options, **kwargs):
    name = f"celery.{kind}"
    return {"task": name, "args": [], "kwargs": kwargs, "options": options, "subtask_type": kind, "immutable": False}


def multiplying():
    """Signatures that multiply, each in some hundred kilobytes."""
    many = [signature(number) for number in range(170)]
    plain = [signature(number, 1) for number in range(2000)]
    chain = compound("chain", {"link_error": many}, tasks=many)
    yield "errbacks times steps", chain
    yield "errbacks times members", compound("chain", {"link_error": many}, tasks=[compound("group", {}, tasks=many), many[0]])
    yield "a body for each part", compound("chord", {}, header=plain, body=compound("chain", {}, tasks=many), kwargs={})
    yield "headers for each member", compound("group", {"headers": {"x": [1] * 50_000}}, tasks=plain)
    nested = many[0]
    for _ in range(40):
        nested = compound("group", {"link_error": many[:3]}, tasks=[compound("chain", {"link_error": many[:3]}, tasks=[nested, many[1]])])
    yield "groups in groups", nested


@pytest.mark.timeout(240)
def test_everything_that_a_sender_can_do(limited, tell):
    def waiting(channel):
        for _ in range(80):
            headers, _ = task("tasks.echo", eta=in_future(days=365))
            send(channel, limited.queue, headers, heavy)

    def fuzzed(channel):
        judge, fuzzer = Judge(TASKS, ACCEPT), Fuzzer(7)
        for _ in range(300):
            message = fuzzer.message()
            if judge.expected(received(message)) != {"held"}:
                channel.basic_publish(message, exchange="", routing_key=limited.queue)

    def request(body):
        """To the remote control, as a client publishes it."""
        message = amqp.Message(body, content_type="application/json", content_encoding="utf-8")
        return lambda channel: channel.basic_publish(message, exchange="celery.pidbox", routing_key="")

    ids = [f"{number:0200}" for number in range(50_000)]
    revoke = json.dumps({"method": "revoke", "arguments": {"task_id": ids}, "destination": None})

    def odd(channel):
        for properties in ({"message_id": ODD}, {"correlation_id": ODD}, {"content_type": ODD}):
            headers, body = task()
            send(channel, limited.queue, headers | {ODD: {ODD: [None]}}, body, **properties)

    heavy = compact([HEAVY])
    limited.survives("names that are no text", odd)
    limited.survives("broken messages", fuzzed)
    limited.survives("100 MB to the remote control", request(b"x" * 100_000_000))
    limited.survives("50,000 long ids to revoke", request(revoke.encode()))
    limited.survives("80 messages of 4 MB that wait for a year", waiting, waiting=80)
    for place in ("errbacks", "callbacks"):
        for what, value in multiplying():

            def followed(channel):
                name, args = ("tasks.fail", ["no"]) if place == "errbacks" else ("tasks.add", [1, 2])
                headers, body = task(name, args, {place: [value]})
                send(channel, limited.queue, headers, body)

            limited.survives(f"{place}: {what}", followed, waiting=80)
    tell(f"waited at most {max(limited.waits.values()):.2f} s: {max(limited.waits, key=limited.waits.get)}")
    late = {what: wait for what, wait in limited.waits.items() if wait > WITHIN}
    assert not late
