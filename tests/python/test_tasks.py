"""Ordinary tasks on the Rust worker of the example tasks_worker and on a Python worker: the same results, the same
events, the same remaining messages.
"""

import contextlib
import json
import re
import signal
import uuid

import kombu
import pytest
from celery import Celery

from support import KINDS, Workers, backend_url, tasks_worker, until
from test_control import events

BROKERS = ["rabbitmq", "redis"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    workers = Workers(tmp_path_factory.mktemp("tasks"), broker, rust={"task_track_started": "true"})
    yield workers
    workers.close()


@contextlib.contextmanager
def only(directory, broker, *flags, **settings):
    """A separate Rust worker with these settings."""
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    queue = f"t{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(directory, queue, broker, backend_url("redis"), *flags, **settings)

    def send(task, *args, **options):
        return app.send_task(f"tasks.{task}", args, queue=queue, **options)

    send.worker = worker
    try:
        yield send
    finally:
        worker.stop()
        app.close()
        broker.delete(queue)


def meta(result):
    """The stored result, without values that differ from run to run."""
    stored = result.backend.get_task_meta(result.id)
    result_value = stored["result"]
    if isinstance(result_value, BaseException):
        result_value = (type(result_value).__module__, type(result_value).__name__, result_value.args)
    lines = (stored["traceback"] or "").strip().splitlines()
    return {
        "status": stored["status"],
        "result": result_value,
        "keys": sorted(stored),
        "first": lines[:1],
        "last": lines[-1:],
        "children": stored["children"],
        "done": stored["date_done"] is not None,
    }


def ended(result, seconds=20):
    until(lambda: result.state in ("SUCCESS", "FAILURE", "REVOKED"), f"{result.id} ends", seconds)
    return meta(result)


def both(workers, task, *args, **options):
    """Runs the task on both workers; returns the outcome, which must be the same."""
    python, rust = (ended(workers.send(kind, task, *args, **options)) for kind in KINDS)
    assert rust == python
    return rust


@pytest.mark.parametrize(
    "task, args",
    [
        ("add", [2, 3]),
        ("echo", [{"a": [1, None, "é"]}]),
        ("fail", ["it broke"]),
        ("fail", ["it broke", "KeyError"]),
        ("retry", [2, 0.1]),
        ("retry", [2, 0.1, 1]),
        ("reject", []),
        ("add", [1]),
    ],
)
def test_results(workers, task, args):
    both(workers, task, *args)


def test_retry_state(workers):
    seen = []
    for kind in KINDS:
        result = workers.send(kind, "retry", 1, 3)
        until(lambda: result.state == "RETRY", "the task is retried")
        retried = meta(result)
        assert retried.pop("children") == [[[result.id, None], None]]
        seen.append(retried)
        assert ended(result)["result"] == 1
    python, rust = seen
    assert rust == python
    assert rust["last"] == ["celery.exceptions.Retry: Retry in 3s: OSError('temporary failure')"]


@pytest.mark.parametrize(
    "state, value",
    [
        ("MOVING", {"bytes": 1, "of": "né"}),
        ("S" * 50, None),
        ("PROGRESS", [1]),
        # Celery also accepts its own names; `FAILURE` with Ignore is a usual method to fail with a mapping.
        ("FAILURE", {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins", "more": 1}),
        ("SUCCESS", 5),
        ("RETRY", {"exc_type": "OSError", "exc_message": "later"}),
    ],
)
def test_update_state(workers, state, value):
    """The stored mapping has the same keys, in the same order, with the same values."""
    stored = []
    for kind in KINDS:
        result = workers.send(kind, "update_state", state, value)
        until(lambda: result.state == state, f"{kind}: the state is {state}")
        backend = result.backend
        raw = json.loads(backend.client.get(backend.get_key_for_task(result.id)))
        assert raw.pop("task_id") == result.id
        stored.append([(key, bool(value) if key == "date_done" else value) for key, value in raw.items()])
    python, rust = stored
    assert rust == python
    line = until(lambda: state_lines(workers, result), "the task's line is in the log")[0]
    assert (line["task"], line["state"]) == ("tasks.update_state", state)


def state_lines(workers, result):
    """Log lines from a task's own code: the task id comes from the span."""
    lines = map(json.loads, filter(lambda line: "state was set" in line, workers.processes["rust"].log().splitlines()))
    return [line for line in lines if line["task_id"] == result.id]


def test_a_state_without_a_name_fails(workers):
    for name in ["", "S" * 51, "A\nB"]:
        failed = ended(workers.send("rust", "update_state", name, None))
        assert "the name of a state has 1 to 50 characters" in failed["result"][2][0]


def revoked(workers):
    """The id of a task that no worker will run."""
    task_id = str(uuid.uuid4())
    replies = workers.app.control.revoke(task_id, reply=True, timeout=2)
    names = [name for reply in replies for name in reply]
    assert all(any(queue in name for name in names) for queue in workers.queues.values()), replies
    return task_id


def test_events_of_each_end(workers):
    shown = {}
    with events(workers.app) as seen:
        for kind in KINDS:
            results = {
                "add": workers.send(kind, "add", 1, 2),
                "fail": workers.send(kind, "fail", "x"),
                "retry": workers.send(kind, "retry", 1, 0.1),
                "reject": workers.send(kind, "reject"),
                "ignore": workers.send(kind, "ignore"),
                "revoked": workers.send(kind, "add", 1, 2, task_id=revoked(workers)),
                "unknown": workers.send(kind, "unknown", 1),
            }

            def types(result):
                return [event["type"] for event in seen if event.get("uuid") == result.id]

            ends = {
                "add": "task-succeeded",
                "fail": "task-failed",
                "retry": "task-succeeded",
                "reject": "task-rejected",
                "ignore": "task-started",
                "revoked": "task-revoked",
                "unknown": "task-failed",
            }
            for name, end in ends.items():
                until(lambda: end in types(results[name]), f"{kind}: {name} ends with {end}, got {types(results[name])}")
            fields = {
                # Sorted, because Python may send the event of a retry after its next run has been received.
                name: sorted(
                    (event["type"], sorted(event), *(str(event.get(key)) for key in ("exception", "result", "utcoffset")))
                    + (type(event.get("traceback")).__name__,)
                    for event in seen
                    if event.get("uuid") == result.id and event["type"] != "task-sent"
                )
                for name, result in results.items()
            }
            shown[kind] = fields
    for name in ends:
        assert shown["rust"][name] == shown["python"][name], name


@pytest.mark.rabbitmq("sizes of frames")
def test_large_headers(workers):
    """Headers larger than the initial frames of our connections: received and, by the retry, sent."""
    for kind in KINDS:
        sent = [workers.send(kind, "retry", 1, 0.1, headers={"large": size * "x"}) for size in (100_000, 1, 60_000)]
        assert [ended(result)["result"] for result in sent] == [1, 1, 1]
    assert workers.processes["rust"].log().count("a message has large headers") == 1


def test_the_retry_message(workers, broker):
    """The message that a worker publishes for the next run, read from a queue without consumers."""
    seen = []
    for kind in KINDS:
        result = workers.send(
            kind,
            "retry",
            1,
            2,
            headers={"mine": {"a": [1, True]}},
            priority=3,
            shadow="shown",
            argsrepr="<args>",
            stamped_headers=["batch"],
            batch="7",
        )
        scheduled = until(lambda: scheduled_of(workers, kind, result.id), "it is scheduled again")
        seen.append(scheduled)
        assert ended(result)["result"] == 1
    python, rust = seen
    assert rust == python


def scheduled_of(workers, kind, task_id):
    for node, requests in (workers.app.control.inspect().scheduled() or {}).items():
        if workers.queues[kind] in node:
            for entry in requests:
                request = entry["request"]
                if request["id"] == task_id:
                    return {
                        "args": request["args"],
                        "name": request["name"],
                        "type": request["type"],
                        "info": {**request["delivery_info"], "routing_key": None},
                        "priority": entry["priority"],
                        "acknowledged": request["acknowledged"],
                        "eta": re.sub(r"[\d.]+", "0", entry["eta"]),
                    }
    return None


def test_ignored_results_are_not_stored(workers):
    for kind in KINDS:
        result = workers.send(kind, "add", 1, 2, ignore_result=True)
        marker = workers.send(kind, "add", 1, 1)
        assert ended(marker)["result"] == 2
        assert workers.app.backend.get_task_meta(result.id)["status"] == "PENDING"


def test_a_panic_is_a_failure(workers):
    assert ended(workers.send("rust", "panic"))["result"][1] == "RuntimeError"


def test_time_limits(workers):
    """Soft limit: the task is asked to stop. Hard limit: it is stopped."""
    soft = ended(workers.send("rust", "sleep", 30, soft_time_limit=0.3))
    assert soft["result"] == ("billiard.exceptions", "SoftTimeLimitExceeded", ())
    hard = ended(workers.send("rust", "sleep", 30, time_limit=1))
    assert hard["result"] == ("billiard.exceptions", "TimeLimitExceeded", (1,))
    assert hard["first"] == []


def test_tasks_with_eta_do_not_delay_others(tmp_path, broker):
    """Many messages with an eta, a prefetch limit of two, and one message without an eta."""
    with only(tmp_path, broker, "-c", "1", worker_prefetch_multiplier="2") as send:
        later = [send("add", 1, n, countdown=6) for n in range(12)]
        now = send("add", 1, 1)
        assert ended(now, 5)["result"] == 2
        assert all(result.state == "PENDING" for result in later)
        for result in later:
            ended(result, 20)


def test_eta_message_is_republished_before_consumer_timeout(tmp_path, broker):
    """A message that waits longer than `worker_eta_hold` is published again, and runs once."""
    with only(tmp_path, broker, worker_eta_hold="1s") as send, events(send("echo", 0).app) as seen:
        result = send("add", 1, 1, countdown=4.5)
        assert ended(result)["result"] == 2

        def types():
            return [event["type"] for event in seen if event.get("uuid") == result.id]

        until(lambda: "task-succeeded" in types(), "all events have come")
        assert types().count("task-started") == 1
        assert types().count("task-received") >= 3


def test_rate_limit(tmp_path, broker):
    with only(tmp_path, broker, "-c", "4", task_default_rate_limit="2/s") as send:
        results = [send("add", n, 1) for n in range(6)]
        done = [ended(result) and result.date_done for result in results]
        assert (max(done) - min(done)).total_seconds() >= 2.3


@pytest.mark.parametrize("sent_before", [False, True])
def test_a_task_that_had_succeeded_is_not_run_again(tmp_path, broker, sent_before):
    """`worker_deduplicate_successful_tasks`: a redelivered message whose result is stored. Its callback and the next step
    of its chain are sent unless the result has them as its children.
    """
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    queue = f"t{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    follow_up = {
        "link": app.signature("tasks.echo", queue=queue, task_id=str(uuid.uuid4())),
        "chain": [app.signature("tasks.echo", queue=queue, task_id=str(uuid.uuid4()))],
    }
    result = app.send_task("tasks.add", [1, 2], queue=queue, **follow_up)
    with broker.channel() as channel:
        # Received and not settled, so that the broker marks it as redelivered.
        until(lambda: channel.basic_get(queue), "the message is there")
    app.backend.store_result(result.id, "the first run's", "SUCCESS")
    if sent_before:
        key = app.backend.get_key_for_task(result.id)
        stored = json.loads(app.backend.get(key)) | {"children": [[[follow_up["link"].id, None], None]]}
        app.backend.set(key, json.dumps(stored))
    worker = tasks_worker(
        tmp_path, queue, broker, backend_url("redis"), worker_deduplicate_successful_tasks="true"
    )
    try:
        worker.says("had succeeded")
        broker.all_settled(queue)
        assert result.get(timeout=5) == "the first run's"
        followed = [app.AsyncResult(one.id) for one in (follow_up["link"], *follow_up["chain"])]
        if sent_before:
            assert [one.state for one in followed] == ["PENDING"] * 2
        else:
            assert [one.get(timeout=5) for one in followed] == ["the first run's"] * 2
    finally:
        worker.stop()
        app.close()
        broker.delete(queue)


def test_hup_restarts_the_program(tmp_path, broker):
    """As in Python: a warm shutdown, and then a restart of the program in the same process."""
    with only(tmp_path, broker) as send:
        running = send("sleep", 2)
        until(lambda: running.state in ("STARTED", "PROGRESS"), "the task runs")
        send.worker.signal(signal.SIGHUP)
        assert ended(running)["result"] == 2
        until(lambda: send.worker.log().count("worker ready") == 2, "the worker is ready again")
        assert ended(send("add", 1, 2))["result"] == 3
        send.worker.signal(signal.SIGTERM)
        assert send.worker.ended() == 0


@contextlib.contextmanager
def raw_events(broker):
    """Raw messages of the exchange `celeryev` from now on: (routing key, body)."""
    seen = []
    with kombu.Connection(broker.url) as connection, connection.channel() as channel:
        kind = "fanout" if broker.url.startswith("redis") else "topic"
        exchange = kombu.Exchange("celeryev", kind)
        queue = kombu.Queue("", exchange, routing_key="#", exclusive=True, auto_delete=True)

        def drain():
            """Returns true if a further message has arrived."""
            before = len(seen)
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            return len(seen) > before

        def receive(body, message):
            seen.append((message.delivery_info["routing_key"], body))

        with kombu.Consumer(channel, [queue], callbacks=[receive], no_ack=True):
            # On Redis, this subscribes.
            drain()
            yield seen, drain


def test_events_of_tasks_are_sent_in_lists(workers, broker):
    """As in Python: many events in one message; Celery's receiver sees each of them, in the order of sending."""
    ends = {"task-received", "task-started", "task-succeeded"}
    with events(workers.app) as received, raw_events(broker) as (raw, drain):
        ids = {workers.send("rust", "add", 1, n).id for n in range(50)}

        def of_burst(news):
            return [event for event in news if event.get("uuid") in ids and event["type"] != "task-sent"]

        def in_lists():
            lists = [body for key, body in raw if key == "task.multi"]
            assert all(isinstance(body, list) for body in lists)
            return [of_burst(body) for body in lists]

        until(lambda: not drain() and sum(map(len, in_lists())) == len(ids) * len(ends), "all events have come")
        until(lambda: len(of_burst(received)) == len(ids) * len(ends), "Celery's receiver has them all")
    assert max(map(len, in_lists())) > 1, "each was in a list of its own"
    sent = [event for body in in_lists() for event in body]
    assert {(event["uuid"], event["type"]) for event in sent} == {(task, end) for task in ids for end in ends}
    clocks = [event["clock"] for event in sent]
    assert len(set(clocks)) == len(sent)
    assert [event["clock"] for event in of_burst(received)] == clocks
    for task in ids:
        of_task = [event for event in sent if event["uuid"] == task]
        assert [event["type"] for event in of_task] == ["task-received", "task-started", "task-succeeded"]
        assert sorted(of_task, key=lambda event: event["clock"]) == of_task


def test_progress(workers):
    """A state and an event that Python workers do not have."""
    with events(workers.app) as seen:
        result = workers.send("rust", "sleep", 5)
        until(lambda: result.state == "PROGRESS", "the task reports its progress")
        assert result.info["total"] == 5
        active = workers.app.control.inspect().active()
        [task] = [task for tasks in active.values() for task in tasks if task["id"] == result.id]
        assert task["progress"]["total"] == 5
        assert ended(result)["result"] == 5
        progress = [event for event in seen if event["type"] == "progress-reported" and event["uuid"] == result.id]
        assert progress and progress[0]["progress"]["total"] == 5
