"""Flower with a Rust and a Python worker: it shows both in the same way, and controls both."""

import contextlib
import json
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from support import HERE, KINDS, Process, Workers, backend_url, clean_environment, tasks_worker, until
from test_cluster import shape

pytestmark = pytest.mark.timeout(120)

BROKERS = ["rabbitmq", "redis"]


class Flower:
    """The program, and its HTTP API."""

    def __init__(self, directory, broker, interpreter=sys.executable):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # `-A peer`: Flower can only send or limit tasks that it knows.
        self.process = Process(
            [interpreter, "-m", "celery", "-A", "peer", "flower", "--address=127.0.0.1", f"--port={port}"]
            + ["--inspect_timeout=2000"],
            directory / "flower.log",
            cwd=HERE,
            env=clean_environment(
                CELERY_BROKER_URL=broker.url,
                CELERY_RESULT_BACKEND=backend_url("redis"),
                FLOWER_UNAUTHENTICATED_API="true",
            ),
        )
        until(self._answers, "Flower answers", 30, log=self.process.log)

    def _answers(self):
        assert self.process.running(), self.process.log()
        with contextlib.suppress(urllib.error.URLError):
            return self._open("/", {})

    def _open(self, path, query, body=None):
        url = self.url + urllib.parse.quote(path) + "?" + urllib.parse.urlencode(query)
        request = urllib.request.Request(url, data=body, method="GET" if body is None else "POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def page(self, path, **query):
        status, text = self._open(path, query)
        assert status == 200, text
        return text

    def get(self, path, **query):
        return json.loads(self.page(f"/api/{path}", **query))

    def post(self, path, body=None, **query):
        """Flower's answer: a mapping, or the reason of a refusal."""
        status, text = self._open(f"/api/{path}", query, json.dumps(body or {}).encode())
        return json.loads(text) if status == 200 else text

    def task(self, task_id):
        """Flower's data about a task; empty before the first event."""
        status, text = self._open(f"/api/task/info/{task_id}", {})
        return json.loads(text) if status == 200 else {"state": None}

    def reaches(self, result, state):
        """Waits until Flower shows this state of a task, and returns all its data about the task."""
        until(lambda: self.task(result.id)["state"] == state, f"Flower shows {state}")
        return self.task(result.id)

    def alive(self, name):
        return self.get("workers", status=1).get(name)


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    settings = {"task_track_started": "true"}
    workers = Workers(tmp_path_factory.mktemp("flower"), broker, "-c", "2", rust=settings)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def flower(tmp_path_factory, broker, workers):
    flower = Flower(tmp_path_factory.mktemp("flower"), broker)

    def nodes():
        alive = [name for name, alive in flower.get("workers", status=1).items() if alive]
        found = {kind: name for kind in KINDS for name in alive if workers.queues[kind] in name}
        return found if len(found) == len(KINDS) else None

    flower.nodes = until(nodes, "both workers are online", 30)
    until(lambda: set(flower.nodes.values()) <= set(flower.get("workers", refresh=1)), "both workers answer", 30)
    yield flower
    log = flower.process.log()
    flower.process.stop()
    # Fields that neither worker has, see test_answers.
    errors = [line for line in log.splitlines() if line.startswith("[E ") and "not enabled" not in line]
    assert "Traceback" not in log and not errors, log


def test_workers(flower, broker):
    """All answers of both workers to Flower have the same keys and types."""
    shown = flower.get("workers", refresh=1)
    python, rust = (shown[flower.nodes[kind]] for kind in KINDS)
    assert abs(rust["timestamp"] - time.time()) < 30
    assert rust["registered"] == [name for name in python["registered"] if name.startswith("tasks.")]
    assert set(rust) == set(python) == {"stats", "registered", "active_queues", "conf", "timestamp"}
    for settings in (python["conf"], rust["conf"]):
        assert settings["result_backend"].startswith("redis://") and settings["broker_url"].partition(":")[0] == broker.url.partition(":")[0]
    for stats in (python["stats"], rust["stats"]):
        stats["total"] = stats["pool"]["writes"] = None
    assert shape(rust["stats"]) == shape(python["stats"])
    assert shape(rust["active_queues"]) == shape(python["active_queues"])


ENDS = {
    "add": (["add", 2, 3], "SUCCESS", {"result": "5", "args": "(2, 3)", "exception": None}),
    "fail": (["fail", "it broke"], "FAILURE", {"result": None, "exception": "ValueError('it broke')"}),
    "retry": (["retry", 1, 0.1], "SUCCESS", {"result": "1", "retries": 1}),
    "reject": (["reject"], "FAILURE", {"result": None, "exception": "reject requeue=False: as asked"}),
}


@pytest.mark.parametrize("end", ENDS)
def test_tasks(flower, workers, end):
    """Flower has the same data about the tasks of both workers, except for values that differ from run to run."""
    call, state, known = ENDS[end]
    seen = {}
    for kind in KINDS:
        result = workers.send(kind, *call)
        task = flower.reaches(result, state)
        assert task["uuid"] == result.id and task["worker"] == flower.nodes[kind]
        assert {key: task[key] for key in known} == known
        assert task["received"] <= task["started"] <= task["timestamp"]
        listed = flower.get("tasks", workername=flower.nodes[kind], state=state)
        assert listed[result.id]["name"] == f"tasks.{call[0]}"
        assert result.id in flower.page(f"/task/{result.id}")
        seen[kind] = {key: shape(value) for key, value in task.items()}
        if end == "reject":
            # Python's event contains a traceback that is not stored.
            del seen[kind]["traceback"]
    assert seen["rust"] == seen["python"]


def test_progress_leaves_the_state_to_the_worker(flower, workers):
    """A running task can be terminated from its page, which then shows its final state."""
    result = workers.send("rust", "sleep", 60)
    until(lambda: result.state == "PROGRESS", "the task reports its progress")
    task = flower.reaches(result, "STARTED")
    assert task["eta"] is None and task["result"] is None
    assert 'id="task-terminate"' in flower.page(f"/task/{result.id}")
    assert flower.post(f"task/revoke/{result.id}", terminate="true") == {"message": f"Revoked '{result.id}'"}
    task = flower.reaches(result, "REVOKED")
    assert task["revoked"] >= task["started"]
    until(lambda: result.state == "REVOKED", "the task is revoked")


def tabs(page):
    """The cells of each tab's tables, by the tab's name."""
    panes = re.split(r'id="tab-(\w+)" role="tabpanel"', page)[1:]
    cells = lambda html: [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", html, re.S)]
    return {name: cells(html) for name, html in zip(panes[::2], panes[1::2], strict=True)}


def test_worker_page(flower, workers):
    """Each tab shows the same fields as for a Python worker."""
    running = {kind: workers.send(kind, "sleep", 3) for kind in KINDS}
    shown = {}
    for kind in KINDS:
        until(lambda: flower.task(running[kind].id)["state"] == "STARTED", "one runs")
        name = flower.nodes[kind]
        flower.get("workers", refresh=1, workername=name)
        shown[kind] = tabs(flower.page(f"/worker/{name}"))
    python, rust = (shown[kind] for kind in KINDS)
    assert list(rust) == list(python)
    for tab in ["pool", "broker", "system"]:
        assert sorted(rust[tab][::2]) == sorted(python[tab][::2]), tab
        assert any(rust[tab][1::2]), tab
    assert rust["queues"][0] == workers.queues["rust"] and len(rust["queues"]) == len(python["queues"])
    assert "tasks.add" in rust["limits"] and "broker_url" in rust["config"]
    for kind in KINDS:
        cells = shown[kind]["tasks"]
        assert "tasks.sleep" in cells and any(cell.startswith(running[kind].id) for cell in cells)


def test_control_of_the_worker(flower, workers, broker):
    rust = flower.nodes["rust"]
    size = lambda: flower.get("workers", refresh=1, workername=rust)[rust]["stats"]["pool"]["max-concurrency"]
    before = size()
    assert flower.post(f"worker/pool/grow/{rust}", n=2)["message"].startswith("Growing")
    until(lambda: size() == before + 2, "the pool has grown")
    assert flower.post(f"worker/pool/shrink/{rust}", n=2)["message"].startswith("Shrinking")
    until(lambda: size() == before, "the pool has shrunk")

    queue = f"{workers.queues['rust']}.more"
    assert flower.post(f"worker/queue/add-consumer/{rust}", queue=queue) == {"message": f"add consumer {queue}"}
    until(lambda: broker.consumers(queue), "the queue is consumed")
    sent = flower.post("task/async-apply/tasks.add", {"args": [1, 2], "queue": queue})
    assert until(lambda: flower.task(sent["task-id"]).get("result"), "the task has run") == "3"
    gone = flower.post(f"worker/queue/cancel-consumer/{rust}", queue=queue)
    assert gone == {"message": f"no longer consuming from {queue}"}
    until(lambda: not broker.consumers(queue), "the queue is not consumed any more")
    broker.delete(queue)


@pytest.mark.parametrize(
    "path, query",
    [
        ("task/timeout/tasks.sleep", {"soft": 30, "hard": 100}),
        ("task/rate-limit/tasks.echo", {"ratelimit": "100/s"}),
        ("task/rate-limit/tasks.echo", {"ratelimit": "0"}),
        ("worker/pool/autoscale/{}", {"min": 1, "max": 3}),
        ("worker/pool/restart/{}", {}),
    ],
)
def test_answers(flower, path, query):
    """Flower shows the answers of both workers in the same way."""
    answers = {}
    for kind in KINDS:
        name = flower.nodes[kind]
        answer = flower.post(path.format(name), workername=name, **query)
        answers[kind] = str(answer).replace(name, "NODE")
    assert answers["rust"] == answers["python"]


def test_a_stopped_worker_is_offline(tmp_path, broker, flower):
    """Offline at once, not only after missing heartbeats; also in `celery status` and `celery events`."""
    dump = celery(tmp_path, broker, "events", "--dump")
    queues = {end: f"bye-{end}-{flower.process.pid}_data_transfer" for end in ["shutdown", "signal"]}
    leaving = {end: tasks_worker(tmp_path, queue, broker, backend_url("redis")) for end, queue in queues.items()}
    try:
        names = {}
        for end, queue in queues.items():
            alive = lambda: [name for name, up in flower.get("workers", status=1).items() if up and queue in name]
            [name] = until(alive, "Flower shows the worker")
            # Flower controls only workers that have answered it.
            until(lambda: name in flower.get("workers", refresh=1, workername=name), "the worker answers")
            until(lambda: f"{name} [" in dump.log(), "the dump shows the worker")
            names[end] = name
        status = celery(tmp_path, broker, "status")
        assert status.ended(30) == 0
        for name in names.values():
            assert re.search(f"{name}: .*OK", status.log()), status.log()

        for end, name in names.items():
            began = time.monotonic()
            if end == "shutdown":
                assert flower.post(f"worker/shutdown/{name}") == {"message": "Shutting down!"}
            else:
                leaving[end].signal(signal.SIGTERM)
            until(lambda: not flower.alive(name), "Flower shows it as offline")
            # Without the event, Flower would notice the end after twice the heartbeat's interval.
            assert time.monotonic() - began < 4
            assert leaving[end].ended() == 0
            until(lambda: re.search(f"{name} .*shutdown", dump.log()), "the dump has the goodbye")
        assert "Traceback" not in dump.log()
    finally:
        for worker in leaving.values():
            worker.stop()
        dump.stop()
        for queue in queues.values():
            broker.delete(queue)


def celery(directory, broker, *arguments):
    """Celery's own command line."""
    command = [sys.executable, "-m", "celery", "-b", broker.url, *arguments]
    return Process(command, directory / f"{arguments[0]}.log", env=clean_environment(PYTHONUNBUFFERED=1))
