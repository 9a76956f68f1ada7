"""Fleets of our worker and Celery's of another version, with a producer, a monitor and Flower of that version.

`CELERY_VERSIONS=5.2,5.4` selects the versions; scripts/celery-versions.sh makes a venv for each. The packages of a version
are in celery_versions/VERSION.txt.
"""

import json
import os
import re
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from brokers import RedisBroker
from support import (
    EXPIRED,
    HERE,
    KINDS,
    REPO,
    Workers,
    backend_url,
    clean_environment,
    python_worker,
    service,
    tasks_worker,
    until,
)
from test_canvas import FAILURES, WORKFLOWS, Maker, record
from test_cluster import command, node, shape
from test_flower import Flower

VERSIONS = os.environ.get("CELERY_VERSIONS", "").split(",")
if VERSIONS == [""]:
    pytest.skip("CELERY_VERSIONS names no version of Celery", allow_module_level=True)

BROKERS = ["rabbitmq", "redis"]
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]


class Client:
    """A client of one version; its methods are the functions of version_client.py."""

    def __init__(self, interpreter, broker):
        self._process = subprocess.Popen(
            [interpreter, HERE / "version_client.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(CELERY_BROKER_URL=broker.url, CELERY_RESULT_BACKEND=backend_url("redis")),
        )

    def __getattr__(self, function):
        def call(*arguments, **named):
            print(json.dumps([function, arguments, named]), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline() or '{"error": "the client has ended"}')
            assert "error" not in answer, answer["error"]
            return answer["value"]

        return call

    def close(self):
        self._process.kill()
        self._process.communicate()


# Two processes (pytest-xdist, `--dist loadgroup`) share the versions.
@pytest.fixture(
    scope="module", params=[pytest.param(version, marks=pytest.mark.xdist_group(version)) for version in VERSIONS]
)
def version(request):
    return tuple(map(int, request.param.split(".")))


@pytest.fixture(scope="module")
def interpreter(version):
    return REPO / ".venv-celery-{}.{}".format(*version) / "bin" / "python"


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker, interpreter):
    workers = Workers(
        tmp_path_factory.mktemp("fleet"), broker, "-c", "2", interpreter=interpreter, mingle=True, gossip=True
    )
    workers.nodes = {kind: until(lambda: node(workers, kind), f"the {kind} worker answers", 30) for kind in KINDS}
    yield workers
    log = workers.processes["python"].log()
    workers.close()
    for text in ("CRITICAL", "Unrecoverable", "unknown message"):
        assert text not in log, log[-5000:]


@pytest.fixture(scope="module")
def client(interpreter, broker, workers):
    client = Client(interpreter, broker)
    client.watch()
    yield client
    client.close()


def ask(workers, client, kind, method, **arguments):
    """The reply of one node to their client."""
    return client.control(method, arguments, [workers.nodes[kind]])[workers.nodes[kind]]


# ---------------------------------------------------------------- tasks

TASKS = {
    "arguments": (["add", [2, 3]], {}),
    "keyword arguments": (["add", [2], {"y": 3}], {}),
    "texts and mappings": (["echo", [{"a": [1, None, "é"]}]], {}),
    "countdown": (["echo", [1]], {"countdown": 0.5}),
    "expired": (["echo", [1]], EXPIRED),
    "priority": (["echo", [1]], {"priority": 3}),
    "compressed": (["echo", ["a" * 1000]], {"compression": "gzip"}),
    "exception": (["fail", ["it broke"]], {}),
    "another exception": (["fail", ["it broke", "KeyError"]], {}),
    "retries": (["retry", [2, 0.1]], {}),
    "too many retries": (["retry", [2, 0.1, 1]], {}),
    "missing argument": (["add", [1]], {}),
    "unknown task": (["no_such_task"], {}),
    "time limit": (["sleep", [60]], {"time_limit": 1}),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(workers, client, name):
    """Their client sees the same outcome from both workers."""
    (task, *arguments), options = TASKS[name]
    python, rust = (
        client.call(f"tasks.{task}", *arguments, queue=workers.queues[kind], **options) for kind in KINDS
    )
    assert rust == python


def test_our_client(workers):
    """Our client sends to their worker and reads its results."""
    program = Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "send_workflows"
    done = subprocess.run(
        [program, workers.broker.url, backend_url("redis"), workers.queues["python"]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chain"], found["error"], found["chord"]) == (112, "ValueError: no", [1, 2, 3])


def is_held(broker, queue):
    """Returns true if a worker holds the only message of a queue."""
    # In Redis, Celery removes a message from its queue before it records that it holds it.
    return broker.ready(queue) == 0 and (not isinstance(broker, RedisBroker) or broker.held_fields(queue))


def is_returned(broker, queue):
    """Returns true if another worker may take the message of a killed one."""
    if not isinstance(broker, RedisBroker):
        return broker.ready(queue) == 1
    [field] = broker.held_fields(queue)
    return broker.client.zscore("unacked_index", field) < time.time() - broker.transport_options["visibility_timeout"]


@pytest.mark.parametrize("killed", KINDS)
def test_messages_of_a_killed_worker(workers, client, run, interpreter, killed):
    """The other worker runs the task."""
    broker, queue = workers.broker, f"killed{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    start = {
        "python": lambda: run(
            *(python_worker, queue, broker, backend_url("redis")),
            interpreter=interpreter,
            settings={"broker_transport_options": broker.transport_options},
        ),
        "rust": lambda: run(tasks_worker, queue, broker, backend_url("redis"), **broker.worker_settings),
    }
    worker = start[killed]()
    task_id = client.send("tasks.add", [1, 2], queue=queue, countdown=1)
    until(lambda: is_held(broker, queue), "the message is taken")
    worker.kill()
    # With Redis, Celery before 5.7 looks for such messages only when it starts, and every 100 s.
    until(lambda: is_returned(broker, queue), "the message is free for others")
    start[next(kind for kind in KINDS if kind != killed)]()
    assert client.outcome_of(task_id) == ["SUCCESS", 3]
    broker.all_settled(queue)
    broker.delete(queue)


# ---------------------------------------------------------------- chains, groups and chords


#: Celery before 5.7 alone does not end these: always for the last two. Its worker waits for the results of a header that has
#: groups in it, and now and then for ever, because the destructor of one result needs a lock that the same thread holds
#: for another one.
ENDLESS = {
    "chord of chains that end in groups",
    "chord with groups that fails",
    "steps after a failed chord",
    "chord in a chain that fails",
}


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in ENDLESS])
def test_workflows(workers, client, name):
    """The result is that of their worker alone, whichever worker runs a step."""

    def run(mix):
        return client.apply(WORKFLOWS[name](Maker(workers, mix)))

    expected = run("p")
    for mix in ["r", "pr", "rp", "prr", "rpp"]:
        assert run(mix) == expected, mix


@pytest.mark.parametrize("name", [name for name in FAILURES if name not in ENDLESS])
def test_failures(workers, client, name):
    """The exception is that of their worker alone, and the errback is sent once."""

    def run(mix):
        with record(workers) as (signature, take):
            workflow = FAILURES[name](Maker(workers, mix))
            workflow.link_error(signature("errback"))
            found = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", json.dumps(client.apply(workflow)))
            return found, len(take(1))

    expected = run("p")
    assert "FAILURE" in expected[0] and expected[1] == 1
    for mix in ["r", "pr", "rp"]:
        assert run(mix) == expected, mix


# ---------------------------------------------------------------- remote control


def test_revoked_ids_of_all(workers, client):
    """Their client revokes at both workers, and sends afterwards."""
    ids = {kind: str(uuid.uuid4()) for kind in KINDS}
    client.control("revoke", {"task_id": list(ids.values())}, list(workers.nodes.values()))
    python, rust = (
        client.call("tasks.add", [1, 2], task_id=ids[kind], queue=workers.queues[kind]) for kind in KINDS
    )
    assert rust == python
    assert python[0] == "REVOKED"


def test_terminate(workers, client):
    outcomes = {}
    for kind in KINDS:
        task_id = client.send("tasks.sleep", [60, False], queue=workers.queues[kind])
        until(lambda: client.state(task_id) == "STARTED", "it runs")
        ask(workers, client, kind, "revoke", task_id=task_id, terminate=True)
        outcomes[kind] = client.outcome_of(task_id)
    assert outcomes["rust"] == outcomes["python"]
    assert outcomes["rust"][0] == "REVOKED"


@pytest.mark.parametrize("newcomer", KINDS)
def test_mingle(workers, client, run, interpreter, newcomer):
    """A new node of one kind does not run a task that only the node of the other kind knows as revoked."""
    other = next(kind for kind in KINDS if kind != newcomer)
    broker, queue, task_id = workers.broker, f"new{uuid.uuid4().hex[:8]}_data_transfer", str(uuid.uuid4())
    ask(workers, client, other, "revoke", task_id=task_id)
    assert task_id not in ask(workers, client, newcomer, "revoked")
    broker.declare(queue)
    client.send("tasks.add", [1, 2], task_id=task_id, queue=queue)
    start = {
        "python": lambda: run(
            python_worker, queue, broker, backend_url("redis"), interpreter=interpreter, mingle=True
        ),
        "rust": lambda: run(tasks_worker, queue, broker, backend_url("redis")),
    }
    start[newcomer]()
    broker.all_settled(queue)
    assert client.outcome_of(task_id)[0] == "REVOKED"
    broker.delete(queue)


def covers(ours, theirs):
    """Returns true if each key of their reply is in ours, with the same type."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(key in ours and covers(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, list):
        return all(covers(*pair) for pair in zip(ours, theirs))
    return ours == theirs or theirs == "NoneType"


INSPECT = ["ping", "clock", "active", "reserved", "scheduled", "stats", "active_queues", "report", "registered", "revoked"]


def test_inspect(workers, client):
    """Our replies have everything that those of their worker have."""
    running = {kind: client.send("tasks.sleep", [60], queue=workers.queues[kind]) for kind in KINDS}
    later = {kind: client.send("tasks.echo", [1], queue=workers.queues[kind], countdown=600) for kind in KINDS}
    for kind in KINDS:
        for method in ("active", "scheduled"):
            until(lambda: ask(workers, client, kind, method), f"{kind}: {method}")
    for method in INSPECT:
        python, rust = (shape(ask(workers, client, kind, method)) for kind in KINDS)
        if method == "stats":
            # Our pool has no child processes to write to.
            del python["pool"]["writes"]
        assert covers(rust, python), (method, rust, python)
    for kind in KINDS:
        ask(workers, client, kind, "revoke", task_id=[running[kind], later[kind]], terminate=True)


CONTROL = [
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": "100/s"}),
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": 0}),
    ("time_limit", {"task_name": "tasks.add", "soft": 10, "hard": 20}),
    ("pool_grow", {"n": 1}),
    ("pool_shrink", {"n": 1}),
    ("autoscale", {"max": 3, "min": 1}),
    ("heartbeat", {}),
    ("add_consumer", {"queue": "another_data_transfer"}),
    ("cancel_consumer", {"queue": "another_data_transfer"}),
    ("terminate", {"task_id": "some-id", "signal": "TERM"}),
    ("no_such_command", {}),
]


@pytest.mark.parametrize("method, arguments", CONTROL)
def test_control(workers, client, method, arguments):
    python, rust = (ask(workers, client, kind, method, **arguments) for kind in KINDS)
    assert rust == python


def test_their_command_line(workers, interpreter):
    for words in [("inspect", "stats"), ("inspect", "report")]:
        assert command(workers, "rust", *words, interpreter=interpreter)


# ---------------------------------------------------------------- events


@pytest.mark.parametrize("task", [["add", [2, 3]], ["fail", ["it broke"]], ["retry", [1, 0.1]]], ids=lambda task: task[0])
def test_events(workers, client, task):
    """Their monitor shows both workers online, and their tasks alike."""
    until(lambda: set(workers.nodes.values()) <= set(client.alive()), "both are online")
    shown = {}
    for kind in KINDS:
        task_id = client.send(f"tasks.{task[0]}", *task[1:], queue=workers.queues[kind])
        until(lambda: client.monitored(task_id).get("state") in ("SUCCESS", "FAILURE"), "the task has ended")
        shown[kind] = client.monitored(task_id)
        assert shown[kind].pop("worker") == workers.nodes[kind]
        if task[0] == "retry":
            # Celery shows the arguments of the next run as a tuple, our worker as the producer did.
            del shown[kind]["args"]
    assert shown["rust"] == shown["python"]


def test_flower(tmp_path, workers, client, interpreter):
    flower = Flower(tmp_path, workers.broker, interpreter)
    try:
        names = set(workers.nodes.values())
        until(lambda: names <= {n for n, up in flower.get("workers", status=1).items() if up}, "both are online", 30)
        until(lambda: names <= set(flower.get("workers", refresh=1)), "both answer", 30)
        tasks = {}
        for kind in KINDS:
            task_id = client.send("tasks.add", [2, 3], queue=workers.queues[kind])
            until(lambda: flower.task(task_id)["state"] == "SUCCESS", "Flower shows the end")
            tasks[kind] = flower.task(task_id)
            assert tasks[kind]["worker"] == workers.nodes[kind]
            assert flower.page(f"/worker/{workers.nodes[kind]}")
        assert shape(tasks["rust"]) == shape(tasks["python"])
        task_id = client.send("tasks.sleep", [60], queue=workers.queues["rust"])
        until(lambda: flower.task(task_id)["state"] == "STARTED", "it runs")
        flower.post(f"task/revoke/{task_id}", terminate="true")
        until(lambda: flower.task(task_id)["state"] == "REVOKED", "it is terminated")
        assert "Traceback" not in flower.process.log()
    finally:
        flower.process.stop()
