"""Revoked ids that survive a restart (`--statedb`), and the log of what a worker does (USR1)."""

import json
import signal
import uuid

import pytest
from celery import Celery

from support import KINDS, backend_url, python_worker, tasks_worker, until

BROKERS = ["rabbitmq"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def start(tmp_path, broker):
    """Starts a worker of a kind, with a client; each on the same queue."""
    queue = f"statedb{uuid.uuid4().hex[:8]}"
    broker.declare(queue)
    started = []
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)

    def begin(kind, *flags):
        kinds = {"python": python_worker, "rust": tasks_worker}
        worker = kinds[kind](tmp_path, queue, broker, backend_url("redis"), *flags)
        started.append(worker)
        return worker

    begin.app, begin.queue = app, queue
    yield begin
    for worker in started:
        worker.stop()
    app.close()
    broker.delete(queue)


def revoked(app):
    """The revoked ids of the only worker."""
    replies = until(lambda: app.control.inspect(timeout=2).revoked(), "the worker answers")
    [ids] = replies.values()
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_revoked_ids_survive_a_restart(start, tmp_path, kind):
    flags = ("--statedb", tmp_path / "state")
    worker = start(kind, *flags)
    task_id = str(uuid.uuid4())
    start.app.control.revoke(task_id, reply=True, limit=1, timeout=5)
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0

    start(kind, *flags)
    assert revoked(start.app) == [task_id]
    result = start.app.send_task("tasks.echo", (1,), queue=start.queue, task_id=task_id)
    assert until(lambda: result.state == "REVOKED", "the task is revoked")


def test_revoked_ids_survive_the_death_of_the_worker(start, tmp_path):
    path = tmp_path / "state"
    worker = start("rust", "--statedb", path)
    task_id = str(uuid.uuid4())
    start.app.control.revoke(task_id, reply=True, limit=1, timeout=5)
    until(lambda: path.exists() and task_id in path.read_text(), "the id is saved")
    worker.kill()
    start("rust", "--statedb", path)
    assert revoked(start.app) == [task_id]


def test_a_damaged_state_file_is_reported_and_replaced(start, tmp_path):
    path = tmp_path / "state"
    path.write_text("{")
    worker = start("rust", "--statedb", path)
    worker.says("the state file is damaged")
    assert (tmp_path / "state.damaged").read_text() == "{"
    start.app.control.revoke("an-id", reply=True, limit=1, timeout=5)
    until(lambda: "an-id" in path.read_text(), "the id is saved")


def test_a_failure_to_write_the_state_file_is_logged_once(start, tmp_path):
    directory = tmp_path / "states"
    directory.mkdir()
    worker = start("rust", "--statedb", directory / "state")
    directory.rename(tmp_path / "gone")
    start.app.control.revoke("an-id", reply=True, limit=1, timeout=5)
    worker.says("the state file cannot be written")
    # It is tried again every second.
    start.app.control.revoke("another-id", reply=True, limit=1, timeout=5)
    (tmp_path / "gone").rename(directory)
    worker.says("the state file is written again")
    assert worker.log().count("the state file cannot be written") == 1
    assert "another-id" in (directory / "state").read_text()


def test_a_state_file_that_cannot_be_written_is_found_at_the_start(start, tmp_path):
    with pytest.raises(AssertionError, match="ended early(?s:.*)--statedb: (?s:.*)No such file or directory"):
        start("rust", "--statedb", tmp_path / "missing" / "state")


def test_usr1_logs_the_tasks(start):
    worker = start("rust", "-c", "1", "--prefetch-multiplier", "5")
    ids = {"runs": start.app.send_task("tasks.sleep", (30,), queue=start.queue).id}
    # The progress that the task reports reaches the worker some time after its start.
    until(lambda: '"progress"' in json.dumps(start.app.control.inspect(timeout=1).active()), "progress")
    ids["waits for a slot or for its rate limit"] = start.app.send_task("tasks.echo", (1,), queue=start.queue).id
    ids["waits for its eta"] = start.app.send_task("tasks.echo", (2,), queue=start.queue, countdown=60).id
    until(lambda: worker.log().count('"task received"') == 3, "the tasks are received")
    worker.signal(signal.SIGUSR1)
    worker.says("activity of the worker")
    for says, task_id in ids.items():
        until(
            lambda: any(f'"task {says}"' in line and task_id in line for line in worker.log().splitlines()),
            f"{task_id} {says}",
        )
    [line] = [json.loads(line) for line in worker.log().splitlines() if '"task runs"' in line]
    assert json.loads(line["progress"])["total"] == 30
    assert worker.running()
