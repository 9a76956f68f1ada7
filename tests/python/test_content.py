"""Bodies in every form that kombu writes, and the message that a retry sends."""

import json
import uuid
from datetime import date, datetime, time, timezone
from decimal import Decimal

import pytest
from celery import Celery

from support import backend_url, tasks_worker, until

BROKERS = ["rabbitmq", "redis"]

COMPRESSIONS = ["gzip", "zlib", "bzip2", "lzma", "brotli", "zstd"]
MOMENT = datetime(2026, 11, 24, 4, 13, 55, 482591, tzinfo=timezone.utc)


class Listener:
    def __init__(self, directory, broker):
        self.broker = broker
        self.queue = f"content{uuid.uuid4().hex[:8]}_data_transfer"
        broker.declare(self.queue)
        self.app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
        self.app.conf.update(accept_content=["json"], task_create_missing_queues=True)
        self.worker = tasks_worker(
            *(directory, self.queue, broker, backend_url("redis"), "-c", "1"),
            accept_content=json.dumps(["json", "application/x-msgpack", "yaml"]),
        )

    def echo(self, value, **options):
        return self.app.send_task("tasks.echo", [value], queue=self.queue, **options).get(timeout=20)

    def close(self):
        self.worker.stop()
        self.app.close()
        self.broker.delete(self.queue)


@pytest.fixture(scope="module")
def listener(tmp_path_factory, broker):
    listener = Listener(tmp_path_factory.mktemp("content"), broker)
    yield listener
    listener.close()


@pytest.mark.parametrize("serializer", ["json", "msgpack", "yaml"])
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_every_serializer_and_compression(listener, serializer, compression):
    value = {"text": "é\n", "list": [1, -2.5, None, True], "long": "x" * 5000}
    assert listener.echo(value, serializer=serializer, compression=compression) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (MOMENT, MOMENT.isoformat()),
        (date(2026, 11, 24), "2026-11-24"),
        (time(4, 13, 55), "04:13:55"),
        (uuid.UUID(int=7), str(uuid.UUID(int=7))),
        (Decimal("1.50"), "1.50"),
        (b"abc", "abc"),
        (b"\xff\x00", "/wA="),
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
    ],
)
def test_values_without_a_json_form_are_text(listener, value, text):
    assert listener.echo([value]) == [text]


@pytest.mark.parametrize("value", [2**70, -(2**63), 2**64 - 1, 0.1, 5e-324, 1.7976931348623157e308, -0.0, 10**4000])
def test_numbers_keep_every_digit(listener, value):
    assert repr(listener.echo(value)) == repr(value)


def test_pickle_is_refused_by_the_settings(listener, tmp_path):
    with pytest.raises(AssertionError, match="pickle is never accepted"):
        tasks_worker(tmp_path, listener.queue, listener.broker, backend_url("redis"), accept_content='["pickle"]')


def test_a_retry_sends_everything_again(tmp_path, broker):
    """Headers with AMQP's own types, stamps and the compressed body are unchanged; headers added by the broker are removed."""
    listener = Listener(tmp_path, broker)
    try:
        task_id = str(uuid.uuid4())
        headers = {
            "task": "tasks.retry",
            "id": task_id,
            "timelimit": [90, None],
            "stamped_headers": ["batch"],
            "stamps": {"batch": "b7"},
            "x-time": datetime(2026, 11, 24, 4, 13, 55),
            "x-number": Decimal("1.50"),
            "x-bytes": b"\xff\x00",
            "x-table": {"a": [1, None, 2.5, True]},
            "x-death": [{"count": 1}],
        }
        body = json.dumps([[1, 3600], {}, {"callbacks": None, "chain": []}])
        broker.publish(
            *(listener.queue, body, headers),
            content_type="application/json",
            content_encoding="utf-8",
            priority=3,
            reply_to="no-client",
            correlation_id="another",
        )
        until(lambda: state(listener, task_id) == "RETRY", "the task is retried")
        # The worker holds the message for the next run until it stops.
        listener.worker.stop()
        with broker.channel() as channel:
            again = until(lambda: channel.basic_get(listener.queue, no_ack=True), "the next run's message")
        got = again.headers
        assert again.body in (body, body.encode())
        for name in ("stamped_headers", "stamps", "x-time", "x-number", "x-bytes", "x-table", "timelimit"):
            assert got[name] == headers[name], name
        assert "x-death" not in got
        assert (got["id"], got["retries"], got["root_id"], got["parent_id"]) == (task_id, 1, task_id, task_id)
        assert got["eta"].endswith("+00:00")
        properties = again.properties
        assert (properties["priority"], properties["reply_to"], properties["correlation_id"]) == (3, "no-client", task_id)
        assert properties["delivery_mode"] == 2
    finally:
        listener.close()


def state(listener, task_id):
    return listener.app.AsyncResult(task_id).state
