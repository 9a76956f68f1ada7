"""A worker with 512 MB of memory and all known hostile messages: it is the same process at the end, and no ordinary
task and no `ping` has waited for long.

The limit is RLIMIT_DATA: the private writable memory of a process (heap, stacks and others). An allocation beyond it
fails, which ends the worker. (RLIMIT_AS would also count reserved memory.)
"""

import json
import os
import resource
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from celery import Celery

from fates import Judge, received
from proxy import Proxy
from support import Process, backend_url, clean_environment, service, until
from test_fuzz import ACCEPT, TASKS, Fuzzer
from test_hostile import HEAVY, ODD, compact, in_future, logged, ran, send, task

BROKERS = ["rabbitmq", "redis"]

LIMIT_MB = 512

# Limits in seconds: of the time for which an ordinary task waits, and of the processor's time that the worker uses
# meanwhile, which does not depend on what else runs on the machine. Each case once took 10 s and more of both.
WAIT, PROCESSOR = 8.0, 4.0


class Limited:
    """The worker, with a proxy in front of its result backend, and the waits of ordinary tasks."""

    def __init__(self, directory, broker, queue):
        self.broker, self.queue, self.waits, self.used = broker, queue, {}, {}
        self.waiting = 0  # messages that wait for their time
        self.app = Celery(broker=broker.url, set_as_current=False)
        backend = urlsplit(backend_url("redis"))
        self.backend = Proxy(backend.hostname, backend.port)
        host = f"{backend.netloc.rpartition('@')[0]}@".lstrip("@") + f"127.0.0.1:{self.backend.port}"
        size = LIMIT_MB << 20
        self.process = Process(
            [Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "tasks_worker"]
            + ["-Q", queue, "-n", f"limited@{queue}", "-E", "-c", "2"],
            directory / "worker.log",
            cwd=directory,
            env=clean_environment(
                CELERY_BROKER_URL=broker.url,
                CELERY_RESULT_BACKEND=urlunsplit(backend._replace(netloc=host)),
                CCAT_DATA_TRANSFER_CELERY__ACCEPT_CONTENT='["json", "msgpack", "yaml"]',
                CCAT_DATA_TRANSFER_LOG__FORMAT="json",
            ),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)),
        ).says("worker ready")

    def survives(self, what, *messages):
        """Publishes messages, and an ordinary task behind them."""
        used = self.processor_time()
        with self.broker.channel() as channel:
            for publish in messages:
                publish(channel)
            headers, body = task(ignore_result=True)
            sent = time.monotonic()
            behind = send(self.broker, channel, self.queue, headers, body)
        self.until(lambda: ran(self.process, behind), f"{what}: the task behind it is run")
        self.waits[what] = time.monotonic() - sent
        self.used[what] = self.processor_time() - used

    def processor_time(self):
        """Seconds of all threads, with the system's work for them."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hears(self, what, body):
        """Sends a request to the remote control, and `ping` and an ordinary task behind it."""

        def request(channel):
            self.broker.broadcast(channel, body)

        self.survives(what, request)
        sent = time.monotonic()
        # Not one of the pool, which the broker may have closed meanwhile.
        with self.app.connection_for_write() as connection:
            assert self.app.control.ping([f"limited@{self.queue}"], timeout=60, connection=connection), what
        self.waits[f"ping after {what}"] = time.monotonic() - sent

    def logs(self, task_id, *messages):
        self.until(lambda: any(logged(self.process, task_id, text) for text in messages), f"{task_id}: {messages}")

    def until(self, condition, what):
        def holds():
            assert self.process.running(), f"{what}: the worker has ended\n{self.process.log()[-3000:]}"
            return condition()

        until(holds, what, 60, log=self.process.log)

    def close(self):
        self.process.stop()
        self.backend.close()
        self.app.close()


@pytest.fixture
def limited(tmp_path, broker):
    queue = f"limited{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    limited = Limited(tmp_path, broker, queue)
    yield limited
    limited.close()
    broker.delete(queue)


def compound(kind, options, **kwargs):
    name = f"celery.{kind}"
    return {"task": name, "args": [], "kwargs": kwargs, "options": options, "subtask_type": kind, "immutable": False}


def multiplying(queue):
    """Signatures that multiply, each of some hundred kilobytes, with their position in the message."""

    def signature(number, size=500):
        args = [number, [1] * size]
        options = {"queue": queue}
        return {"task": "tasks.add", "args": args, "kwargs": {}, "options": options, "subtask_type": None, "immutable": True}

    many = [signature(number) for number in range(170)]
    plain = [signature(number, 1) for number in range(2000)]
    chain = compound("chain", {"link_error": many}, tasks=many)
    nested = many[0]
    for _ in range(40):
        nested = compound("group", {"link_error": many[:3]}, tasks=[compound("chain", {"link_error": many[:3]}, tasks=[nested, many[1]])])
    body = compound("chord", {}, header=plain[:1], body=chain, kwargs={})
    yield "errbacks times steps", "errbacks", [chain]
    yield "errbacks times members", "errbacks", [compound("chain", {"link_error": many}, tasks=[compound("group", {}, tasks=many), *many[:60]])]
    yield "a body for each part", "errbacks", [compound("chord", {}, header=plain, body=compound("chain", {}, tasks=many), kwargs={})]
    yield "headers for each member", "callbacks", [compound("group", {"headers": {"x": [1] * 50_000}}, tasks=plain)]
    yield "groups in groups", "callbacks", [nested]
    yield "a chain's next step", "chain", [chain]
    yield "a chord's body", "callbacks", [body]


NOT_SENT = "errbacks of a failed task were not sent", "follow-up messages of the task cannot be sent, so the task fails"


def broken_messages(limited):
    def names(channel):
        for properties in ({"message_id": ODD}, {"correlation_id": ODD}, {"content_type": ODD}):
            headers, body = task()
            send(limited.broker, channel, limited.queue, headers | {ODD: {ODD: [None]}}, body, **properties)

    def fuzzed(channel):
        judge, fuzzer = Judge(TASKS, ACCEPT), Fuzzer(7)
        for _ in range(200):
            message = fuzzer.message()
            if judge.expected(received(message)) != {"held"}:
                limited.broker.forward(channel, limited.queue, message)

    if limited.broker.has_amqp:
        limited.survives("names that are not text", names)
    limited.survives("broken messages", fuzzed)


def signatures(limited):
    for what, place, value in multiplying(limited.queue):
        name, args = ("tasks.fail", ["no"]) if place == "errbacks" else ("tasks.echo", [1])
        headers, body = task(name, args, {place: value})
        assert 300_000 < len(body) < 1_000_000
        # Two at a time, which is the limit of running tasks.
        other = headers | {"id": str(uuid.uuid4())}
        limited.survives(what, *(lambda channel, h=h: send(limited.broker, channel, limited.queue, h, body) for h in (headers, other)))
        for one in headers, other:
            if what == "a chord's body":
                limited.logs(one["id"], "task succeeded")
            else:
                limited.logs(one["id"], *NOT_SENT)


def remote_control(limited):
    revoke = lambda ids: json.dumps({"method": "revoke", "arguments": {"task_id": ids}, "destination": None}).encode()
    limited.hears("60 MB to the remote control", b"x" * 60_000_000)
    limited.hears("50,000 long ids to revoke", revoke([f"{number:0200}" for number in range(50_000)]))
    # Tasks that earlier messages have sent would wait for the result backend, in all slots.
    limited.until(lambda: limited.broker.unsettled(limited.queue) == limited.waiting, "earlier tasks have ended")
    limited.backend.pull(silently=True)
    limited.hears("100 ids to revoke without a result backend", revoke([str(uuid.uuid4()) for _ in range(100)]))
    limited.until(lambda: "REVOKED was not stored" in limited.process.log(), "the result backend does not answer")
    limited.backend.plug()


def waiting_messages(limited):
    def light(channel):
        headers, body = task(eta=in_future(days=365))
        for other in [{}] * 3 + [{"id": str(uuid.uuid4())} for _ in range(12)]:
            send(limited.broker, channel, limited.queue, headers | other, body)

    def heavy(channel):
        for _ in range(20):
            headers, _ = task("tasks.echo", eta=in_future(days=365))
            send(limited.broker, channel, limited.queue, headers, large)

    large = compact([HEAVY])
    limited.survives("15 messages that wait for a year, 3 of them the same", light)
    for number in range(1, 5):
        limited.survives(f"messages {number * 20 - 19} to {number * 20} of 4 MB that wait for a year", heavy)
    limited.waiting = 15 + 80
    limited.broker.close_connections()
    limited.process.says("connected to the broker again")
    limited.survives("95 messages that come again")


@pytest.mark.timeout(300)
def test_the_worker_survives_every_message(limited, tell):
    broken_messages(limited)
    signatures(limited)
    remote_control(limited)
    waiting_messages(limited)
    limited.until(lambda: limited.broker.unsettled(limited.queue) == limited.waiting, "the rest is settled")
    waits, used = limited.waits, limited.used
    print(*(f"{wait:6.2f} {used.get(what, 0):6.2f} {what}" for what, wait in waits.items()), sep="\n")
    slowest, busiest = max(waits, key=waits.get), max(used, key=used.get)
    tell(f"waited at most {waits[slowest]:.2f} s: {slowest}; processor {used[busiest]:.2f} s: {busiest}")
    late = {what for what, wait in waits.items() if wait > WAIT} | {what for what, time in used.items() if time > PROCESSOR}
    assert not late
