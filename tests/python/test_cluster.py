"""A Rust and a Python worker side by side: every inspect and control command answers alike, revoked ids travel, elections
are answered.
"""

import json
import subprocess
import sys
import uuid

import pytest
from celery.events.event import get_exchange
from kombu import Exchange

from support import EXPIRED, KINDS, Workers, backend_url, clean_environment, events, tasks_worker, until
from test_tasks import ended, only

pytestmark = pytest.mark.timeout(180)

BROKERS = ["rabbitmq", "redis"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    workers = Workers(tmp_path_factory.mktemp("cluster"), broker, "-c", "2", "--prefetch-multiplier", "2")
    workers.nodes = {
        kind: until(lambda: node(workers, kind), f"the {kind} worker answers", 30) for kind in KINDS
    }
    yield workers
    workers.close()


def node(workers, kind):
    names = [name for reply in workers.app.control.ping(timeout=1) for name in reply]
    return next((name for name in names if workers.queues[kind] in name), None)


def command(workers, kind, *words, interpreter=sys.executable):
    """JSON output of the program `celery` for one node."""
    verb, method, *arguments = words
    done = subprocess.run(
        [interpreter, "-m", "celery", "-b", workers.broker.url, verb]
        + ["-j", "-t", "3", "-d", workers.nodes[kind], method, *map(str, arguments)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)[workers.nodes[kind]]


def ask(workers, kind, method, **arguments):
    replies = workers.app.control.broadcast(
        method, arguments=arguments, destination=[workers.nodes[kind]], reply=True, timeout=5
    )
    return replies[0][workers.nodes[kind]] if replies else None


def shape(value):
    """Keys and types of a value; all numbers are one type, and the first element represents a list."""
    match value:
        case dict():
            return {key: shape(one) for key, one in value.items()}
        case [first, *_]:
            return [shape(first)]
        case list():
            return []
        case bool() | None | str():
            return type(value).__name__
        case _:
            return "number"


@pytest.fixture(scope="module")
def busy(workers):
    """Both workers have two running tasks, one that waits for a slot, and one that waits for its eta."""
    tasks = {}
    for kind in KINDS:
        later = workers.send(kind, "echo", {"a": None}, countdown=600, shadow="shown")
        until(lambda: len(ask(workers, kind, "scheduled")) == 1, "one waits for its time")
        running = [workers.send(kind, "sleep", 120) for _ in range(2)]
        until(lambda: len(ask(workers, kind, "active")) == 2, "two run")
        waiting = workers.send(kind, "echo", "x")
        until(lambda: len(ask(workers, kind, "reserved")) >= 1, "one waits for a place")
        tasks[kind] = {"running": running[0].id, "waiting": waiting.id, "later": later.id}
    return tasks


@pytest.mark.parametrize("method", ["ping", "clock", "active", "reserved", "scheduled", "stats", "active_queues", "report"])
def test_inspect(workers, busy, method):
    python, rust = (command(workers, kind, "inspect", method) for kind in KINDS)
    python, rust = shape(python), shape(rust)
    if method == "active":
        # Only our worker shows the progress that a task has reported.
        for task in rust:
            task.pop("progress", None)
    if method == "stats":
        # The pools differ: Python counts its writes to each child process.
        for stats in (python, rust):
            stats["total"] = stats["pool"]["writes"] = None
    assert rust == python


def test_query_task(workers, busy):
    answers = {}
    for kind in KINDS:
        found = command(workers, kind, "inspect", "query_task", *busy[kind].values(), "unknown")
        for _, task in found.values():
            task.pop("progress", None)
        answers[kind] = {name: (found[task_id][0], shape(found[task_id])) for name, task_id in busy[kind].items()}
        assert set(found) == set(busy[kind].values())
    assert answers["rust"] == answers["python"]


def test_a_waiting_task_is_terminated(workers, busy):
    """The reply names it, and it does not run."""
    for kind in KINDS:
        for waiting in "waiting", "later":
            task_id = busy[kind][waiting]
            reply = ask(workers, kind, "revoke", task_id=task_id, terminate=True)
            assert reply == {"ok": f"terminate: {task_id}"}
            until(lambda: workers.app.AsyncResult(task_id).state == "REVOKED", f"{kind}: {waiting} is revoked")


def test_inspect_revoked_and_registered(workers):
    task_id = str(uuid.uuid4())
    for kind in KINDS:
        ask(workers, kind, "revoke", task_id=task_id)
        assert task_id in command(workers, kind, "inspect", "revoked")
    python, rust = (command(workers, kind, "inspect", "registered") for kind in KINDS)
    assert rust == [name for name in python if name.startswith("tasks.")]
    python, rust = (ask(workers, kind, "registered", taskinfoitems=["acks_late", "max_retries", "ignore_result"]) for kind in KINDS)
    assert rust == [name for name in python if name.startswith("tasks.")]


def test_an_empty_destination_is_every_node(workers):
    for arguments in {"destination": []}, {"pattern": "", "matcher": "glob"}:
        replies = workers.app.control.broadcast("ping", reply=True, timeout=2, **arguments)
        names = {name for reply in replies for name in reply}
        assert names >= set(workers.nodes.values()), arguments


def test_report_names_celery(workers):
    reports = [ask(workers, kind, "report")["ok"] for kind in KINDS]
    assert all("\nsoftware -> celery:5.7.0 " in report for report in reports), reports


#: Keys that Celery's own tests expect.
EXPECTED_KEYS = {
    "accept_content",
    "broker_heartbeat",
    "broker_url",
    "deprecated_settings",
    "enable_utc",
    "include",
    "result_backend",
    "timezone",
    "worker_hijack_root_logger",
    "worker_log_color",
}


def test_inspect_conf(workers):
    """The values differ; common keys must have the same type, and there must be no password."""
    python, rust = (command(workers, kind, "inspect", "conf") for kind in KINDS)
    assert EXPECTED_KEYS <= set(rust)
    # Our worker imports no module.
    assert rust["include"] == []
    for key in set(python) & set(rust) - {"include"}:
        assert shape(rust[key]) == shape(python[key]), key
    for shown in (python, rust):
        assert "guest:guest" not in json.dumps(shown)


@pytest.fixture(scope="module")
def idle(workers):
    """Returns true if no task runs, and none waits for a slot."""
    for kind in KINDS:
        for request in ask(workers, kind, "active"):
            ask(workers, kind, "revoke", task_id=request["id"], terminate=True)
        until(lambda: not ask(workers, kind, "active") and not ask(workers, kind, "reserved"), f"{kind} is idle")
    return workers


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("rate_limit", {"task_name": "tasks.add", "rate_limit": "100/s"}),
        ("rate_limit", {"task_name": "tasks.add", "rate_limit": 0}),
        ("rate_limit", {"task_name": "no.such.task", "rate_limit": "1/m"}),
        ("time_limit", {"task_name": "tasks.add", "soft": 10, "hard": 20}),
        ("time_limit", {"task_name": "no.such.task", "soft": 10}),
        ("pool_grow", {"n": 1}),
        ("autoscale", {"max": 3, "min": 1}),
        ("pool_restart", {}),
        ("heartbeat", {}),
        ("revoke", {"task_id": "some-id"}),
        ("revoke", {"task_id": "some-id", "terminate": True}),
        ("terminate", {"task_id": "some-id", "signal": "TERM"}),
        ("revoke_by_stamped_headers", {"headers": {"batch": ["v"]}}),
        ("add_consumer", {"queue": "another_data_transfer"}),
        ("cancel_consumer", {"queue": "another_data_transfer"}),
        ("no_such_command", {}),
        ("revoke", {"task_id": []}),
        ("revoke", {"task_id": [], "terminate": True}),
    ],
)
def test_control(workers, method, arguments):
    python, rust = (ask(workers, kind, method, **arguments) for kind in KINDS)
    assert rust == python


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("rate_limit", {"task_name": "tasks.echo"}),
        ("rate_limit", {}),
        ("terminate", {"task_id": ["some-id"]}),
        ("terminate", {}),
        ("revoke", {}),
        ("revoke", {"terminate": True}),
        ("revoke_by_stamped_headers", {}),
        ("query_task", {}),
        ("hello", {}),
        ("election", {"id": "1"}),
        ("add_consumer", {}),
        ("cancel_consumer", {}),
        ("heartbeat", {"freq": 1}),
        ("report", {"x": 1}),
        ("enable_events", {"x": 1}),
        ("active_queues", {"x": 1}),
        ("autoscale", {"most": 3}),
        ("ping", {"state": 1}),
        ("terminate", {"task_id": "some-id", "signal": "term"}),
        ("revoke", {"task_id": "some-id", "terminate": True, "signal": "NONE"}),
    ],
)
def test_wrong_arguments(workers, method, arguments):
    """CPython's errors."""
    python, rust = (ask(workers, kind, method, **arguments) for kind in KINDS)
    assert "error" in python
    assert rust == python


def test_wrong_arguments_change_nothing(workers):
    limited = "tasks.echo [rate_limit=100/s]"
    for kind in KINDS:
        ask(workers, kind, "rate_limit", task_name="tasks.echo", rate_limit="100/s")
        ask(workers, kind, "rate_limit", task_name="tasks.echo")
        task_id = str(uuid.uuid4())
        ask(workers, kind, "terminate", task_id=task_id)
        assert limited in ask(workers, kind, "registered")
        assert task_id not in ask(workers, kind, "revoked")
        ask(workers, kind, "rate_limit", task_name="tasks.echo", rate_limit=0)


def test_the_command_heartbeat(workers):
    """The program `celery` ends with 0, because there is a reply: null."""
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-b", workers.broker.url, "control", "-j", "-t", "3", "-d", workers.nodes[kind]]
            + ["heartbeat"],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout) == [{workers.nodes[kind]: None}]


def test_revoked_ids_of_older_celery(idle, workers):
    """Celery 5.4 sends a mapping; the answer contains the ids of the sender."""
    task_id = str(uuid.uuid4())
    answer = ask(workers, "rust", "hello", from_node="old@else", revoked={task_id: [1795493630.7, task_id]})
    assert task_id in answer["revoked"]
    assert ended(workers.send("rust", "echo", 1, task_id=task_id))["status"] == "REVOKED"
    other = str(uuid.uuid4())
    python, rust = (
        other in ask(workers, kind, "hello", from_node="new@else", revoked=[other])["revoked"] for kind in KINDS
    )
    assert python and rust


def test_a_revoked_task_that_is_sent_at_once_does_not_run(idle, workers):
    results = []
    with workers.app.connection_for_write() as connection, connection.channel() as channel:
        Exchange("celery.pidbox", type="fanout", durable=False)(channel).declare()

        def message(body, **headers):
            text = json.dumps(body)
            return channel.prepare_message(text, 0, "application/json", "utf-8", headers, {"delivery_mode": 2})

        for _ in range(20):
            result = workers.app.AsyncResult(str(uuid.uuid4()))
            revoke = message({"method": "revoke", "arguments": {"task_id": result.id}})
            task = message([[1], {}, {}], task="tasks.echo", id=result.id, lang="py")
            # One directly behind the other.
            channel.basic_publish(revoke, "celery.pidbox", "")
            channel.basic_publish(task, "", workers.queues["rust"])
            results.append(result)
            until(result.ready, "the task has ended")
    assert [result.state for result in results] == ["REVOKED"] * len(results)


def test_expired_tasks_are_listed_as_revoked(idle, workers):
    # A worker that holds as many messages as it may would not receive these.
    for kind in KINDS:
        result = workers.send(kind, "echo", 1, **EXPIRED)
        until(lambda: result.state == "REVOKED", f"{kind}: it has expired")
        assert result.id in command(workers, kind, "inspect", "revoked")


def test_bad_rate(workers):
    """Python's text names its own parser's error, so only the beginning is compared."""
    for kind in KINDS:
        reply = ask(workers, kind, "rate_limit", task_name="tasks.add", rate_limit="often")
        assert reply["error"].startswith("Invalid rate limit string: ValueError("), reply


def test_pool_size(idle, workers):
    size = lambda: ask(workers, "rust", "stats")["pool"]["max-concurrency"]
    before = size()
    ask(workers, "rust", "pool_grow", n=2)
    assert size() == before + 2
    ask(workers, "rust", "pool_shrink", n=3)
    assert size() == max(before - 1, 1)
    ask(workers, "rust", "pool_grow", n=1)
    reply = ask(workers, "rust", "pool_shrink", n=size())
    assert reply == {"error": """ValueError("Can't shrink pool. All processes busy!")"""}
    assert size() == max(before, 2)


def test_consumers_are_added_and_cancelled(idle, workers, broker):
    queue = f"more{uuid.uuid4().hex[:8]}_data_transfer"
    ask(workers, "rust", "add_consumer", queue=queue)
    until(lambda: broker.consumers(queue), "the queue is consumed")
    result = workers.app.send_task("tasks.add", [1, 2], queue=queue)
    assert ended(result, 60)["result"] == 3
    names = [entry["name"] for entry in ask(workers, "rust", "active_queues")]
    assert queue in names
    ask(workers, "rust", "cancel_consumer", queue=queue)
    until(lambda: not broker.consumers(queue), "the queue is not consumed any more")
    assert queue not in [entry["name"] for entry in ask(workers, "rust", "active_queues")]
    broker.delete(queue)


def test_revoked_by_a_stamp(idle, workers):
    ask(workers, "rust", "revoke_by_stamped_headers", headers={"batch": ["bad"]})
    bad = workers.send("rust", "add", 1, 2, stamped_headers=["batch"], batch="bad")
    good = workers.send("rust", "add", 1, 2, stamped_headers=["batch"], batch="good")
    assert ended(good, 60)["result"] == 3
    assert ended(bad)["status"] == "REVOKED"


def test_an_election_is_answered(workers):
    with events(workers.app) as seen, workers.app.connection() as connection:
        # A topic exchange on RabbitMQ, a fanout exchange on Redis.
        producer = connection.Producer(exchange=get_exchange(connection))
        election = str(uuid.uuid4())
        producer.publish(
            {
                "type": "worker-elect",
                "hostname": "stranger@else",
                "id": election,
                "topic": "task",
                "action": {},
                "cver": 1,
                "clock": 100000,
                "timestamp": 0,
                "utcoffset": 0,
                "pid": 1,
            },
            routing_key="worker.elect",
        )

        def acked():
            return [e for e in seen if e["type"] == "worker-elect-ack" and e["hostname"] == workers.nodes["rust"]]

        until(acked, "the election is answered")
        assert acked()[0]["id"] == election and acked()[0]["clock"] > 100000


def test_a_new_node_does_not_run_what_others_know_as_revoked(workers, tmp_path):
    """Also if the task waits in the queue when the node starts."""
    task_id, queue = str(uuid.uuid4()), f"{workers.queues['rust']}.new"
    ask(workers, "python", "revoke", task_id=task_id)
    workers.broker.declare(queue)
    result = workers.app.send_task("tasks.add", [1, 2], queue=queue, task_id=task_id)
    newcomer = tasks_worker(tmp_path, queue, workers.broker, backend_url("redis"))
    try:
        # Python has stored REVOKED at the request.
        workers.broker.all_settled(queue)
        assert ended(result)["status"] == "REVOKED"
    finally:
        newcomer.stop()
        workers.broker.delete(queue)


def test_forbidden_requests_are_refused(tmp_path, broker):
    with only(tmp_path, broker, worker_remote_control_allowed='["terminate"]') as send:
        app = send("echo", 1).app
        [reply] = app.control.broadcast("shutdown", reply=True, timeout=2, pattern="tasks-t*", matcher="glob") or [None]
        assert reply is None
        replies = app.control.broadcast("pool_grow", reply=True, timeout=2, pattern="tasks-t*", matcher="glob")
        [answer] = [a for r in replies for a in r.values()]
        assert answer["error"].startswith("PermissionError('pool_grow is not among"), answer
        assert ended(send("add", 1, 1))["result"] == 2
