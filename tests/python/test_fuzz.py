"""Random and broken messages: the worker survives, the queue is empty, and messages that Python rejects are dead-lettered.

The messages are seeded. 3,000 by default; FUZZ_MESSAGES=100000 (and FUZZ_SEED=n) for more.
"""

import base64
import bz2
import json
import lzma
import os
import random
import sys
import time
import uuid
import zlib
from collections import Counter
from datetime import datetime, timezone
from decimal import Decimal

import amqp
import brotli
import msgpack
import pytest
import yaml
from backports import zstd

from fates import Judge, received
from support import backend_url, tasks_worker, until

BROKERS = ["rabbitmq", "redis"]

TASKS = ["tasks.add", "tasks.echo", "tasks.fail", "tasks.ignore", "tasks.panic"]
ACCEPT = ["json", "msgpack", "yaml"]
LIMIT = 100_000  # bytes of a body
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
COMPRESSIONS = {
    "application/x-gzip": zlib.compress,
    "gzip": zlib.compress,
    "zlib": zlib.compress,
    "application/x-bz2": bz2.compress,
    "bzip2": bz2.compress,
    "bzip": bz2.compress,
    "application/x-lzma": lzma.compress,
    "lzma": lambda body: lzma.compress(body, format=lzma.FORMAT_ALONE),
    "xz": lzma.compress,
    "application/x-brotli": brotli.compress,
    "brotli": brotli.compress,
    "application/zstd": zstd.compress,
    "zstd": zstd.compress,
    "zstandard": zstd.compress,
}
TIMES = [
    "2001-01-01T00:00:00+00:00",
    "2001-01-01T00:00:00.123456",
    "2001-01-01 00:00:00Z",
    "20010101T000000",
    "2001-W01-1",
    "2001-123",
    "2001",
    "2001-01-01T24:00",
    "2001-01-01T00:00:00-05:30",
    "soon",
    "2001-13-01",
    "2001-01-01T00:00:61",
    "2001-01-01T00:00:00+25:00",
    "",
]
ENVELOPES = [
    ("datetime", "2001-01-01T00:00:00+00:00"),
    ("datetime", "soon"),
    ("datetime", 7),
    ("date", "2001-01-01"),
    ("time", "04:13:55.5"),
    ("uuid", {"hex": "8f8de06861384418a4f05107449d652d"}),
    ("uuid", {"hex": "8f8de068", "version": 4}),
    ("decimal", "1.50"),
    ("decimal", "1.5.0"),
    ("bytes", "é"),
    ("base64", "//4="),
    ("base64", "//4"),
    ("set", [1]),
    ([], 1),
]


class Fuzzer:
    """Generates messages of all shapes, most of them nearly right."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def maybe(self, probability):
        return self.random.random() < probability

    def one_of(self, *values):
        return self.random.choice(values)

    def value(self, depth=0):
        """A JSON value."""
        kinds = ["null", "bool", "int", "huge", "float", "odd", "text", "envelope"] + ["list", "dict"] * (depth < 4)
        match self.random.choice(kinds):
            case "null":
                return None
            case "bool":
                return self.maybe(0.5)
            case "int":
                return self.random.randint(-(2**70), 2**70) >> self.random.randrange(70)
            case "huge":
                return self.one_of(2**63, 2**64, -(2**63) - 1, 10**40)
            case "float":
                return self.random.uniform(-1e6, 1e6)
            case "odd":
                return self.one_of(float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0)
            case "text":
                return "".join(self.random.choices("abcé\"\\'\n\x00\x7f😀\ud800 0", k=self.random.randrange(12)))
            case "envelope":
                kind, value = self.random.choice(ENVELOPES)
                return {"__type__": kind, "__value__": value}
            case "list":
                return [self.value(depth + 1) for _ in range(self.random.randrange(5))]
            case "dict":
                keys = self.random.choices(["a", "b", "task", "id", "args", "kwargs", "é", ""], k=self.random.randrange(4))
                return {key: self.value(depth + 1) for key in keys}

    def amqp_value(self, depth=0):
        """A value that a header can have."""
        return self.random.choice(
            [
                lambda: None,
                lambda: self.maybe(0.5),
                lambda: self.random.randint(-(2**63) + 1, 2**63 - 1) >> self.random.randrange(63),
                lambda: self.random.uniform(-1e6, 1e6),
                lambda: self.one_of("", "a", "é" * 30, *TIMES),
                lambda: self.random.randbytes(self.random.randrange(8)),
                lambda: datetime(2001, 1, 1, tzinfo=timezone.utc),
                lambda: Decimal("1.50"),
                lambda: [self.amqp_value(depth + 1) for _ in range(self.random.randrange(3))] if depth < 3 else [],
                lambda: {self.one_of("a", "b", "__type__"): self.amqp_value(depth + 1)} if depth < 3 else {},
            ]
        )()

    def arguments(self):
        """args and kwargs, which the task mostly accepts."""
        args = self.one_of([1, 2], [self.value()], [self.value(), self.value()], [], self.value() if self.maybe(0.1) else [3])
        kwargs = self.one_of({}, {}, {}, {"value": self.value()}, self.value() if self.maybe(0.1) else {})
        return args, kwargs

    def fields(self):
        """The headers of a message."""
        fields = {"task": self.random.choice(TASKS), "id": str(uuid.UUID(int=self.random.getrandbits(128)))}
        if self.maybe(0.05):
            fields["task"] = self.one_of("no.such.task", "tasks.ad", "", "é")
        for name, values in {
            "lang": ["py", "rust", None],
            "shadow": [None, "another", ""],
            "eta": [None, None, None, *TIMES],
            "expires": [None, None, None, *TIMES],
            "group": [None, "g"],
            "group_index": [None, 0, 7],
            "retries": [0, 1, None],
            "timelimit": [[None, None], [60, 30.5], None],
            "root_id": [None, "r"],
            "parent_id": [None, "p"],
            "argsrepr": ["(1,)", None],
            "kwargsrepr": ["{}", None],
            "origin": ["gen1@vm"],
            "ignore_result": [None, True, False],
            "stamped_headers": [None, ["batch"], []],
            "stamps": [{}, {"batch": 7}],
        }.items():
            if self.maybe(0.4):
                fields[name] = self.random.choice(values)
        return fields

    def written(self, value):
        """A value in a random serializer: (body, content type, content encoding)."""
        kind = self.random.choices(["json", "msgpack", "yaml", "pickle", "text"], [80, 8, 8, 2, 2])[0]
        try:
            match kind:
                case "msgpack":
                    return msgpack.packb(value), "application/x-msgpack", "binary"
                case "yaml" if "\\uD8" not in (text := yaml.safe_dump(value)):  # PyYAML refuses half a surrogate pair
                    return text.encode(), "application/x-yaml", "utf-8"
        except Exception:  # values that these cannot serialize are written as JSON
            pass
        body = json.dumps(value, ensure_ascii=self.maybe(0.5)).encode("utf-8", "surrogatepass")
        if kind == "pickle":
            return body, "application/x-python-serialize", "binary"
        if kind == "text":
            return body, self.one_of("text/plain", "application/data", "application/text", "a/b"), "utf-8"
        return body, "application/json", self.one_of("utf-8", "UTF-8", "binary", None)

    def broken(self, data):
        """Bytes with a few changes."""
        data = bytearray(data)
        for _ in range(self.random.choice([1, 1, 2, 5])):
            at = self.random.randrange(len(data) + 1)
            match self.random.randrange(5):
                case 0:
                    data[at : at + 1] = self.random.randbytes(1)
                case 1:
                    del data[at : at + self.random.randrange(1, 10)]
                case 2:
                    data[at:at] = self.one_of(b"[", b"]", b"{", b'"', b"\xff", b",", b"\\", b"NaN", b"1", b" ", b"null")
                case 3:
                    del data[at:]
                case 4:
                    data += data[at : at + 50]
        return bytes(data)

    def message(self):
        """The next message."""
        fields = self.fields()
        args, kwargs = self.arguments()
        embed = dict(EMBED) if self.maybe(0.8) else self.one_of(None, {}, {"other": 1}, self.value())
        protocol = self.random.choices(["2", "1", "hybrid", "noise"], [70, 20, 6, 4])[0]
        headers, value = fields, [args, kwargs, embed]
        if protocol == "1":
            headers = {}
            value = fields | EMBED | {"args": args, "kwargs": kwargs, "utc": True, "taskset": None}
        elif protocol == "hybrid":
            headers = {key: value for key, value in fields.items() if key == "task" or self.maybe(0.5)}
            value = self.fields() | {"args": args, "kwargs": kwargs}
        elif protocol == "noise":
            headers = self.one_of({}, fields)
            value = self.value()
        if self.maybe(0.15):  # fields of other types, or without some
            for _ in range(self.random.randrange(1, 4)):
                name = self.random.choice([*headers, "task", "id", "eta", "expires", "timelimit", "compression", "x-mine"])
                if name in ("task", "id", "eta", "expires") or self.maybe(0.5):
                    self.one_of(
                        lambda: headers.__setitem__(name, self.amqp_value()),
                        lambda: headers.__setitem__(name, self.amqp_value()),
                        lambda: headers.pop(name, None),
                        lambda: isinstance(headers.get(name), str)
                        and headers.__setitem__(name, self.broken(headers[name].encode()).decode("latin1")),
                    )()
        if isinstance(value, dict) and self.maybe(0.1) and value:
            name = self.random.choice(list(value))
            self.one_of(lambda: value.__setitem__(name, self.value()), lambda: value.pop(name))()
        if isinstance(value, list) and self.maybe(0.05):
            self.one_of(lambda: value.append(1), lambda: value and value.pop(), value.clear)()
        body, content_type, content_encoding = self.written(value)
        if self.maybe(0.15):
            body = self.broken(body)
        if self.maybe(0.02):
            body = self.one_of(b"", b"null", b"0", b"[" * 100_000, b'{"a":' * 2000, self.random.randbytes(40))
        if self.maybe(0.15):
            name = self.random.choice(list(COMPRESSIONS))
            body, headers["compression"] = COMPRESSIONS[name](body), name
            if self.maybe(0.15):
                body = self.broken(body)
        elif self.maybe(0.01):
            headers["compression"] = self.one_of("lz4", "", "gzip", 7, True)
        properties = {"content_type": content_type, "content_encoding": content_encoding}
        if self.maybe(0.05):
            properties = {key: self.one_of(None, "", "x" * 255, "é") for key in properties}
        for name, values in {
            "priority": [0, 9, 255],
            "correlation_id": ["c", ""],
            "reply_to": ["", "no-client"],
            "delivery_mode": [1, 2],
        }.items():
            if self.maybe(0.3):
                properties[name] = self.random.choice(values)
        properties = {name: value for name, value in properties.items() if value is not None}
        return amqp.Message(body, application_headers=headers, **properties)


@pytest.mark.timeout(1800)
def test_messages_of_all_kinds(broker, tmp_path):
    count, seed = int(os.environ.get("FUZZ_MESSAGES", 3000)), int(os.environ.get("FUZZ_SEED", 1))
    queue = f"fuzz{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(
        *(tmp_path, queue, broker, backend_url("redis"), "-c", "8", "--prefetch-multiplier", "50"),
        accept_content=json.dumps(ACCEPT),
        max_body_bytes=LIMIT,
    )
    judge, fuzzer = Judge(TASKS, ACCEPT), Fuzzer(seed)
    began = time.monotonic()
    sent = {}
    with broker.channel() as channel:
        while len(sent) < count:
            message = fuzzer.message()
            fates = judge.expected(received(message))
            if fates != {"held"}:
                number = str(len(sent))
                message.properties["message_id"] = number
                sent[number] = (fates, message)
                broker.forward(channel, queue, message)
    published = time.monotonic() - began

    def settled():
        assert worker.running(), f"the worker has ended:\n{worker.log()[-5000:]}"
        return broker.ready(queue) == 0 and broker.unsettled(queue) == 0

    until(settled, "every message is settled", 900)
    took = time.monotonic() - began
    assert worker.running(), worker.log()[-5000:]
    # Redis keeps no rejected messages.
    dead = drained(broker, f"{queue}.dead") if broker.has_dead_letters else set()
    fates = Counter("/".join(sorted(fates)) for fates, _ in sent.values())
    print(f"\n{count} messages, seed {seed}: {published:.1f} s to publish, {took:.1f} s to settle; {fates}, {len(dead)} dead")
    wrong = [
        (fates, fate, message.properties, message.body[:400])
        for number, (fates, message) in sent.items()
        if broker.has_dead_letters and (fate := "reject" if number in dead else "ack") not in fates
    ]
    for case in wrong[:30]:
        print(*case, sep="\n   ")
    assert not wrong, f"{len(wrong)} of {count}, seed {seed}"
    worker.stop()
    broker.delete(queue)


def test_deeply_nested_headers(broker, tmp_path):
    """A few kilobytes that a library parses by recursion: they would crash a worker with usual stacks, and then the next one."""
    queue = f"deep{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, backend_url("redis"), "-c", "1")
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(100_000)
        for depth in (300, 3000, 20_000):
            headers = {"task": "tasks.echo", "id": str(uuid.uuid4())}
            broker.publish_nested(queue, json.dumps([[depth], {}, {}]), headers, depth)
        settled = lambda: worker.log().count("task succeeded") + broker.parked(queue) == 3
        until(lambda: settled() or not worker.running(), "all three are run or parked", 60)
        assert worker.running(), worker.log()[-2000:]
    finally:
        sys.setrecursionlimit(limit)
        worker.stop()
        broker.delete(queue)


def drained(broker, queue):
    """The message ids in a queue."""
    found = set()
    with broker.channel() as channel:
        total = broker.ready(queue)
        channel.basic_consume(queue, no_ack=True, callback=lambda message: found.add(message.properties["message_id"]))
        while len(found) < total:
            channel.connection.drain_events(timeout=20)
    return found
