"""A client of one version of Celery, in the Python of that version: producer, monitor and remote control.

test_versions.py starts it and calls its functions. A call is a line of JSON on standard input, `[function, arguments, keyword
arguments]`. The answer is a line on standard output, `{"value": …}` or `{"error": traceback}`.
"""

import gc
import json
import os
import sys
import threading
import traceback
from contextlib import suppress

from celery import Celery
from celery.result import GroupResult

app = Celery(broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
cluster = app.events.State()


def send(*task, **options):
    """Sends a task; returns its id."""
    return app.send_task(*task, **options).id


def call(*task, **options):
    """Sends a task; returns its outcome."""
    return outcome(app.send_task(*task, **options))


def apply(signature):
    """Applies a signature; returns its outcome."""
    return outcome(app.signature(signature).apply_async())


def outcome_of(task_id):
    return outcome(app.AsyncResult(task_id))


def outcome(result):
    """The final state and the value; for a group those of each member, for an exception its class and arguments."""
    if isinstance(result, GroupResult):
        return [outcome(member) for member in result.results]
    value = result.get(timeout=30, propagate=False)
    if isinstance(value, Exception):
        value = [f"{type(value).__module__}.{type(value).__name__}", [str(one) for one in value.args]]
    return [result.state, value]


def state(task_id):
    return app.AsyncResult(task_id).state


def control(method, arguments=None, destination=None, timeout=5):
    """The replies of all nodes, or of those of `destination`, by the nodes' names."""
    replies = app.control.broadcast(
        method, arguments=arguments or {}, destination=destination, reply=True, timeout=timeout
    )
    return {node: reply for answer in replies for node, reply in answer.items()}


def watch():
    """Collects events from now on."""
    threading.Thread(target=receive, daemon=True).start()


def receive():
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": cluster.event})
        while True:
            # Without a time limit, because events are lost between two calls.
            with suppress(OSError):
                receiver.capture(limit=None, timeout=None, wakeup=False)


def alive():
    return [worker.hostname for worker in cluster.alive_workers()]


def monitored(task_id):
    """A task as the events describe it, or nothing before the first one."""
    task = cluster.tasks.get(task_id)
    if task is None:
        return {}
    names = ("state", "name", "args", "kwargs", "result", "exception", "retries")
    return {name: getattr(task, name) for name in names} | {
        "worker": task.worker and task.worker.hostname,
        "times": [name for name in ("received", "started", "succeeded", "failed", "revoked") if getattr(task, name)],
        "traceback": bool(task.traceback),
    }


def main():
    # Celery before 5.7 can block for ever: the destructor of a result unsubscribes, for which redis needs a lock; if the
    # collector calls it inside of another call for which the same thread holds this lock, that call never ends.
    gc.disable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else is printed must not be read as an answer.
    for line in sys.stdin:
        function, arguments, named = json.loads(line)
        try:
            answer = {"value": globals()[function](*arguments, **named)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
