"""Expected disposition of a message by a Python worker: runs kombu's and Celery's own code without a broker.

`Judge.fate(message)` runs the real `Consumer.create_task_handler()`, the real strategy and the real `Request` over an
`amqp.Message`, with a channel that records the settlement and a pool that runs nothing. The answer is one of

    "ack", "reject"   the settlement that is sent to the broker
    "held"            the message waits for its eta
    "dies"            the exception would end the worker, and the message would come back to the next one

A worker that must not die has to handle the last kind differently. `Judge.expected(message)` returns the disposition by
our worker: it rejects the message, so that it can be examined in the dead-letter queue, and stores FAILURE
InvalidTaskError if the id is known. The exceptions:

- A body whose content type is text or bytes is never a task. Python tries to decode it first, with any codec that
  the content encoding names, and acknowledges it if that fails; our worker rejects it always.
- An id that is neither text nor an integer (null, a time, a list ...) cannot have a result. Python runs the task.
- YAML that PyYAML rejects may be valid YAML; our worker reads YAML 1.2 where the meaning is the same.
- Fields that Python checks only when it runs a task (the time limits, the third element of the body) are checked on
  receipt: a message with invalid values is rejected even if it has expired.
- A mapping without `args` with a protocol 2 header is a hybrid without arguments: it runs, or is rejected if it has no
  id or an invalid time.
"""

import logging
import math

import amqp
from celery import Celery
from celery.worker import request as worker_request
from celery.worker.consumer.consumer import Consumer
from celery.worker.request import Request
from kombu.serialization import prepare_accept_content
from kombu.transport.pyamqp import Message

class Channel:
    """Records the settlement of a message."""

    no_ack_consumers = None

    def __init__(self):
        self.settled = []

    def basic_ack(self, tag, multiple=False):
        self.settled.append("ack")

    def basic_reject(self, tag, requeue):
        assert not requeue
        self.settled.append("reject")


class Nothing:
    """Has every attribute; each is a function that does nothing."""

    def __getattr__(self, name):
        return Nothing()

    def __call__(self, *args, **kwargs):
        return Nothing()

    def __bool__(self):
        return False


def function(*args, **kwargs):
    """Replaces every task; it is never called."""


class NotedRequest(Request):
    """Records the request of the last message that could be decoded."""

    last = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        NotedRequest.last = self

    def is_whole(self):
        """Returns true if Python could run it: Python checks these fields only then."""
        _args, _kwargs, embed = self._Request__payload
        pair = self.time_limits
        return isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(embed or {}, dict)


class Judge(Consumer):
    """A consumer without a connection."""

    def __init__(self, tasks, accept):
        self.app = Celery("judge", broker="memory://", backend="disabled://", set_as_current=False)
        self.app.conf.accept_content = accept
        for name in tasks:
            self.app.task(name=name, acks_late=True, Request=NotedRequest)(function)
        self.app.finalize()
        self.accept = prepare_accept_content(accept)
        self.hostname = "judge"
        self.connection_errors = ()
        self.event_dispatcher = None
        self.timer = Nothing()
        self.timer.call_at = lambda *args, **kwargs: self.outcome.append("held")
        self.qos = Nothing()
        self.disable_rate_limits = True
        self.task_buckets = {name: None for name in self.app.tasks}
        self.pool = Nothing()
        self.controller = Nothing()
        self.controller.state = worker_request.state
        self.on_task_message = set()
        self.on_task_request = self.run
        self.restart_count = 0
        self._maximum_prefetch_restored = True
        self.strategies = {name: task.start_strategy(self.app, self) for name, task in self.app.tasks.items()}
        self.handle = self.create_task_handler()
        self.outcome = []
        logging.getLogger("celery").setLevel(logging.CRITICAL + 1)

    def call_soon_ack(self, p, *args, **kwargs):
        return p(*args, **kwargs)

    def run(self, request):
        """Replaces the pool without running the task: the outcome is a result, and the message is acknowledged."""
        _soft, _hard = request.time_limits
        _args, _kwargs, embed = request.body if request._decoded else request.message.payload
        {}.update({}, **(embed or {}))
        request.acknowledge()

    def fate(self, raw):
        channel = Channel()
        self.outcome = channel.settled
        worker_request.revoked_tasks.clear()
        NotedRequest.last = None
        raw.delivery_info = {"delivery_tag": 1, "consumer_tag": "c", "exchange": "", "routing_key": "q", "redelivered": False}
        try:
            message = Message(raw, channel=channel)
            message.accept = self.accept
            if message.errors:
                message._reraise_error(self.on_decode_error)
            else:
                self.handle(message)
        except Exception:  # any exception here would end the worker
            return "dies"
        assert len(channel.settled) <= 1, channel.settled
        return channel.settled[0] if channel.settled else "dies"


    def expected(self, raw):
        """The allowed dispositions by our worker."""
        fate = self.fate(raw)
        if raw.properties.get("content_type", "") in ("", "application/data", "application/text"):
            # Except for messages that are rejected earlier: failed decompression, an unknown task.
            return {fate, "reject"} if fate != "dies" else {"reject"}
        if fate != "reject" and is_bare_hybrid(raw, self.accept):
            return {"ack", "reject"}
        request = NotedRequest.last
        if fate == "ack" and not request and raw.properties["content_type"] == "application/x-yaml":
            return {"ack", "reject"}
        if fate == "ack" and request and not (is_id(request.id) and request.is_whole()):
            return {"reject"}
        if fate == "dies":
            return {"reject"}
        return {fate}


def is_id(value):
    """Returns true if our worker accepts it as an id: results are stored under its text. Floats without a JSON number
    (NaN, infinity) count as text."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, str) and value != "" or isinstance(value, int) and not isinstance(value, bool)


def is_bare_hybrid(raw, accept):
    """Returns true if a message with a protocol 2 header has a mapping without arguments as its body. Python accepts a
    mapping of three keys as a body, and calls the task with the first two."""
    if "task" not in (raw.headers or {}):
        return False
    try:
        payload = Message(raw, channel=None, accept=accept).decode()
    except Exception:
        return False
    return isinstance(payload, dict) and "args" not in payload


def received(message):
    """The message in the form in which a broker delivers it: its properties written to bytes and read again."""
    written = message._serialize_properties()
    read = amqp.Message(message.body)
    read._load_properties(amqp.basic_message.Message.CLASS_ID, written, 0)
    if isinstance(read.body, str):
        read.body = read.body.encode()
    return read
