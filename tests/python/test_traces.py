"""Traces: the spans that a collector gets from workers and managers, as children of a Python producer's spans by the real
instrumentation of Celery."""

import contextlib
import http.server
import json
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest
from celery import Celery, chain, signature
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from support import TRANSFER, backend_url, tasks_worker, until

pytestmark = pytest.mark.timeout(120)

BROKERS = ["rabbitmq", "redis"]

KINDS = {1: "internal", 3: "client", 4: "producer", 5: "consumer"}
LOST = "traces were not accepted; their spans are lost, nothing else is affected"
AGAIN = "traces are accepted again; the spans in between are lost"
KEY = f"key{uuid.uuid4().hex}"


def value(any_value):
    kind = any_value.WhichOneof("value")
    got = getattr(any_value, kind)
    return [value(one) for one in got.values] if kind == "array_value" else got


def mapping(attributes):
    return {attribute.key: value(attribute.value) for attribute in attributes}


class Span:
    def __init__(self, span, resource):
        self.name, self.kind, self.resource = span.name, KINDS[span.kind], resource
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.attributes, self.state = mapping(span.attributes), span.trace_state
        self.start, self.end = span.start_time_unix_nano, span.end_time_unix_nano
        self.error = span.status.message if span.status.code == 2 else None
        self.exceptions = [mapping(event.attributes) for event in span.events if event.name == "exception"]

    def __repr__(self):
        return f"{self.kind} {self.name} {self.id} under {self.parent or 'nothing'} {self.attributes}"


class Collector:
    """A collector that accepts OTLP over HTTP."""

    def __init__(self, port=0):
        self.spans, self.headers, self.bodies = [], [], []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                collector.take(dict(self.headers), body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_port
        self.address = f"http://127.0.0.1:{self.port}/v1/traces"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def take(self, headers, body):
        self.headers.append(headers)
        self.bodies.append(body)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = mapping(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += [Span(span, resource) for span in of_scope.spans]

    def of_task(self, task_id, count=1):
        """The spans of the attempts at a task, in their order, when there are at least `count`."""

        def found():
            own = [s for s in self.spans if s.kind == "consumer" and s.attributes["messaging.message.id"] == task_id]
            return sorted(own, key=lambda span: span.start) if len(own) >= count else None

        return until(found, f"{count} spans of task {task_id} among {self.spans}")

    def of_trace(self, trace_id):
        return [span for span in self.spans if span.trace == trace_id]

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextlib.contextmanager
def collecting(port=0):
    collector = Collector(port)
    try:
        yield collector
    finally:
        collector.close()


@pytest.fixture(scope="module")
def collector():
    with collecting() as collector:
        yield collector


@contextlib.contextmanager
def instrumented():
    """The real instrumentation of Python's Celery in this process, with its recorded spans."""
    recorded, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(recorded))
    CeleryInstrumentor().instrument(tracer_provider=provider)
    try:
        yield recorded
    finally:
        CeleryInstrumentor().uninstrument()


class Tasks:
    """A traced worker of the example tasks_worker, and a producer for it."""

    def __init__(self, directory, broker, address, **environment):
        self.queue = f"traces-{uuid.uuid4().hex[:8]}"
        self.broker = broker
        broker.declare(self.queue)
        variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": 100} | environment
        self.worker = tasks_worker(directory, self.queue, broker, backend_url("redis"), variables=variables)
        self.app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
        self.app.conf.task_default_queue = self.queue

    def send(self, task, *args, **options):
        return self.app.send_task(f"tasks.{task}", args, queue=self.queue, **options)

    def sent(self, task, *args, **options):
        """Sends a task, and waits for its end; returns the result."""
        result = self.send(task, *args, **options)
        result.get(timeout=20, propagate=False)
        return result

    def events(self, message):
        lines = map(json.loads, self.worker.log().splitlines())
        return [line for line in lines if line["message"] == message]

    def close(self):
        self.app.close()
        self.worker.stop()
        self.broker.delete(self.queue)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, broker, collector):
    directory = tmp_path_factory.mktemp("traces")
    headers = directory / "headers"
    headers.write_text(f"api-key={KEY},x-tenant=a%20b\n")
    headers.chmod(0o600)
    environment = {"TASKS_WORKER_TRACES__HEADERS_FILE": headers, "OTEL_RESOURCE_ATTRIBUTES": "deployment=test"}
    tasks = Tasks(directory, broker, collector.address, **environment)
    yield tasks
    tasks.close()


def test_an_attempt_is_a_child_of_its_producer(tasks, collector):
    with instrumented() as recorded:
        result = tasks.sent("add", 2, 3)
    assert result.result == 5
    (producer,) = recorded.get_finished_spans()
    (span,) = collector.of_task(result.id)
    assert (span.name, span.kind, span.error) == ("run/tasks.add", "consumer", None)
    assert span.trace == trace.format_trace_id(producer.context.trace_id)
    assert span.parent == trace.format_span_id(producer.context.span_id)
    expected = {
        "celery.action": "run",
        "celery.task_name": "tasks.add",
        "celery.state": "SUCCESS",
        "messaging.message.id": result.id,
        "messaging.conversation_id": result.id,
        "messaging.destination": tasks.queue,
        "messaging.system": tasks.broker.system,
        "messaging.operation.type": "process",
        "ccat.message": "ack",
    }
    assert span.attributes.items() >= expected.items()
    assert span.attributes["celery.hostname"].startswith(f"tasks-{tasks.queue}@")
    assert span.resource.items() >= {"service.name": "tasks-worker", "deployment": "test"}.items()
    assert span.resource["process.pid"] == tasks.worker.pid
    # The log lines have the trace's id; only the collector receives the key.
    (line,) = [line for line in tasks.events("task succeeded") if line["task_id"] == result.id]
    assert (line["trace_id"], line["span_id"]) == (span.trace, span.id)
    assert (collector.headers[0]["api-key"], collector.headers[0]["x-tenant"]) == (KEY, "a b")
    assert KEY not in tasks.worker.log()


def test_every_run_of_a_retried_task_has_its_span(tasks, collector):
    with instrumented() as recorded:
        result = tasks.sent("retry", 2, 0.01)
    producer = trace.format_span_id(recorded.get_finished_spans()[0].context.span_id)
    first, second, last = collector.of_task(result.id, 3)
    assert [span.parent for span in (first, second, last)] == [producer] * 3
    assert [span.attributes["celery.state"] for span in (first, second, last)] == ["RETRY", "RETRY", "SUCCESS"]
    assert "celery.retries" not in first.attributes and last.attributes["celery.retries"] == 2
    assert first.attributes["celery.retry.reason"].startswith("Retry in 0.01s")
    assert first.exceptions == [{"exception.type": "OSError", "exception.message": "temporary failure"}]
    assert (first.error, last.error) == ("temporary failure", None)


def test_a_retried_task_without_a_producers_span_is_one_trace(tasks, collector):
    result = tasks.sent("retry", 1, 0.01)
    first, second = collector.of_task(result.id, 2)
    assert (first.parent, second.parent, second.trace) == ("", first.id, first.trace)


def test_follow_up_tasks_are_children_of_the_attempt(tasks, collector):
    def add(*args, **options):
        return signature("tasks.add", args=args, app=tasks.app, queue=tasks.queue, **options)

    with instrumented() as recorded:
        errback = signature("tasks.echo", args=("failed",), immutable=True, app=tasks.app, queue=tasks.queue)
        failing = signature("tasks.fail", args=("as asked",), immutable=True, app=tasks.app, queue=tasks.queue)
        result = chain(add(1, 2), add(3), failing.on_error(errback)).apply_async()
        result.get(timeout=20, propagate=False)
    (producer,) = recorded.get_finished_spans()
    below = trace.format_span_id(producer.context.span_id)
    for step in (result.parent.parent, result.parent, result):
        (run,) = collector.of_task(step.id)
        assert run.parent == below, run
        assert run.trace == trace.format_trace_id(producer.context.trace_id)
        if step is not result:
            (sent,) = [span for span in collector.of_trace(run.trace) if span.parent == run.id]
            assert (sent.kind, sent.attributes["celery.action"]) == ("producer", "apply_async")
            assert sent.name == f"apply_async/{sent.attributes['celery.task_name']}"
            below = sent.id
    assert (run.attributes["celery.state"], run.error) == ("FAILURE", "as asked")
    assert run.exceptions == [{"exception.type": "ValueError", "exception.message": "as asked"}]

    def errback():
        of_trace = collector.of_trace(run.trace)
        sent = [span.id for span in of_trace if span.parent == run.id and span.kind == "producer"]
        return [span for span in of_trace if span.name == "run/tasks.echo" and [span.parent] == sent]

    until(errback, "the errback is beneath the task that failed")


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_trace_headers_of_messages(tasks, collector):
    """Both protocols, and invalid headers: they begin a new trace."""

    def deliver(headers, protocol=2):
        task = str(uuid.uuid4())
        if protocol == 2:
            body, more = [[1, 2], {}, {}], {"task": "tasks.add", "id": task, "lang": "py"}
        else:
            body, more = {"task": "tasks.add", "id": task, "args": [1, 2], "kwargs": {}}, {}
        properties = {"content_type": "application/json", "content_encoding": "utf-8"}
        tasks.broker.publish(tasks.queue, json.dumps(body), headers | more, **properties)
        return task

    good = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    # The producer does not record the trace, so the worker does not either.
    unrecorded = deliver({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    known = [deliver(good), deliver(good, protocol=1)]
    strange = [
        deliver({"traceparent": text})
        for text in (f"00-{TRACE}-{PARENT}-01-x", "0" * 100_000, f"00-{'0' * 32}-{PARENT}-01", "", 7, ["00"], {"a": 1})
    ]
    for task in known:
        (span,) = collector.of_task(task)
        assert (span.trace, span.parent, span.state) == (TRACE, PARENT, "vendor=1")
    for task in strange:
        (span,) = collector.of_task(task)
        assert span.trace != TRACE and not span.parent
    until(lambda: unrecorded in [line["task_id"] for line in tasks.events("task succeeded")], "it has run")
    collector.of_task(tasks.sent("add", 1, 2).id)
    assert unrecorded not in [span.attributes.get("messaging.message.id") for span in collector.spans]


def test_a_transfer_is_one_trace_from_manager_to_commit(deployment):
    with collecting() as collector:
        deployment.settings(traces={"endpoint": collector.address, "service_name": "transfers"}, transfer={"max_retries": 0})
        good, bad = deployment.package(), deployment.transfer_of_nothing()
        deployment.schedule()
        worker = deployment.worker()
        deployment.reaches(good, "COMPLETED")
        deployment.reaches(bad, "FAILED")
        # The last spans are sent before the process ends.
        worker.signal(15)
        assert worker.ended() == 0
        attempts = {span.attributes["ccat.transfer.id"]: span for span in collector.spans if span.kind == "consumer"}
        assert attempts.keys() == {good, bad} and attempts[good].trace != attempts[bad].trace
        for attempt in attempts.values():
            (sent,) = [span for span in collector.of_trace(attempt.trace) if span.id == attempt.parent]
            assert (sent.kind, sent.name, sent.parent) == ("producer", f"apply_async/{TRANSFER}", "")
            assert sent.resource["service.name"] == "transfers"
            assert sent.resource["process.pid"] != attempt.resource["process.pid"] == worker.pid
            assert attempt.name == f"run/{TRANSFER}"

        def steps(of):
            # An ended span is sent a moment later if a thread of SQLite still holds it.
            below = [span for span in collector.of_trace(of.trace) if span.parent == of.id]
            assert all(of.start <= span.start <= span.end <= of.end for span in below)
            return sorted(below, key=lambda span: span.start)

        names = ["acquire", "plan", "claim", "prepare", "copy", "verify", "publish", "commit"]
        assert [step.name for step in steps(attempts[good])] == [f"transfer/{name}" for name in names]
        assert attempts[good].attributes.items() >= {
            "ccat.transfer.attempt": 1,
            "ccat.transfer.origin": deployment.origin_site,
            "ccat.transfer.destination": deployment.destination_site,
            "ccat.transfer.bytes": 1024 * 1024,
            "ccat.transfer.outcome": "copied",
            "celery.state": "SUCCESS",
        }.items()
        failed = attempts[bad]
        *_, last = steps(failed)
        code = failed.attributes["ccat.transfer.error_code"]
        assert (last.name, last.attributes["error.type"]) == ("transfer/prepare", code)
        assert failed.attributes["ccat.transfer.outcome"] == "failed"
        assert failed.error == last.error == deployment.row(bad)["failure_error_message"]
        # No span contains the addresses of the services.
        password = deployment.broker.url.partition("@")[0].rpartition(":")[2]
        assert password.encode() not in b"".join(collector.bodies)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_unreachable_collector_is_logged_once(tmp_path, broker):
    port = free_port()
    tasks = Tasks(tmp_path, broker, f"http://127.0.0.1:{port}/v1/traces")
    try:
        tasks.sent("add", 1, 1)
        tasks.worker.says(LOST)
        # Each in a separate batch.
        for n in range(3):
            assert tasks.sent("add", n, n).result == 2 * n
            time.sleep(0.15)
        with collecting(port) as collector:
            collector.of_task(tasks.sent("add", 1, 1).id)
            tasks.worker.says(AGAIN)
        tasks.sent("add", 1, 1)
        tasks.worker.stop()
        first, *more = tasks.events(LOST)
        assert first["level"] == "WARN" and first["collector"].endswith(f":{port}/v1/traces")
        # A new outage, which is noticed at the end.
        assert len(more) == 1 and tasks.worker.ended() == 0
        (again,) = tasks.events(AGAIN)
        assert again["spans"] == 4
    finally:
        tasks.close()


def test_a_hanging_collector_delays_the_stop_briefly(tmp_path, broker):
    with socket.create_server(("127.0.0.1", 0), backlog=10) as silent:
        tasks = Tasks(tmp_path, broker, f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        try:
            for n in range(5):
                assert tasks.sent("add", n, n).result == 2 * n
            began = time.monotonic()
            tasks.worker.signal(15)
            assert tasks.worker.ended() == 0
            assert time.monotonic() - began < 9
            assert tasks.events("the last traces could not be sent in time")
        finally:
            tasks.close()


def test_doctor_checks_the_collector(deployment):
    def verdict():
        done = deployment.cli("doctor", "--json", "--skip", "limits", check=False)
        (finding,) = [finding for finding in json.loads(done.stdout)["checks"] if finding["check"] == "traces"]
        return finding["verdict"], finding["found"]

    with collecting() as collector:
        deployment.settings(traces={"endpoint": collector.address})
        assert verdict() == ("green", "the collector accepts traces")
        assert not collector.spans and len(collector.bodies) == 1
    colour, found = verdict()
    assert colour == "yellow" and "refused" in found


def test_opentelemetrys_own_switch(deployment):
    """OTEL_SDK_DISABLED has priority over an endpoint; without an endpoint no thread is started."""
    deployment.settings(traces={"endpoint": "http://127.0.0.1:9/v1/traces"})
    worker = deployment.worker(OTEL_SDK_DISABLED="true")
    transfer = deployment.package()
    deployment.schedule()
    deployment.reaches(transfer, "COMPLETED")
    threads = [path.read_text() for path in Path(f"/proc/{worker.pid}/task").glob("*/comm")]
    assert not [name for name in threads if name.startswith("OpenTelemetry")], threads
    assert LOST not in worker.log() and '"trace_id"' not in worker.log()

