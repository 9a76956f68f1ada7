"""Writes crates/celery-protocol/tests/golden/canvas.json: the messages that real Celery sends after a task. The tests of
`celery_protocol::canvas` read it.

A client applies workflows. Celery's own tracer "runs" every message that results from them, and sends the follow-up
messages; nothing leaves the process. Each run is one case: the message, the return value of the task, and the sent
messages and stored notes. Further cases are a client's messages for each workflow, and a running task's messages when
it is replaced or extends its chord. Run this script by hand after an upgrade of Celery:

    .venv/bin/python tests/python/canvas_goldens.py
"""

import contextlib
import copy
import json
from collections import deque
from pathlib import Path

from celery import Celery, chain, chord, group
from celery._state import _task_stack
from celery.app.trace import build_tracer
from celery.backends.base import Backend
from celery.exceptions import Ignore

TARGET = Path(__file__).resolve().parent.parent.parent / "crates" / "celery-protocol" / "tests" / "golden" / "canvas.json"


class Notes(Backend):
    """A result backend that only keeps the data about chords and children."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes, self.grown, self.children = [], [], None

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        if request is not None:
            self.children = self.current_task_children(request)

    def get_state(self, task_id):
        return "PENDING"

    def set_chord_size(self, group_id, chord_size):
        self.sizes.append([group_id, chord_size])

    def add_to_chord(self, chord_id, result):
        self.grown.append([chord_id, result.id])

    def on_task_call(self, producer, task_id):
        pass

    # No caller waits for a result.
    def add_pending_result(self, result, *args, **kwargs):
        return result

    def remove_pending_result(self, result):
        return result


app = Celery("goldens", broker="memory://", set_as_current=True)
app.conf.update(task_default_queue="rust", task_create_missing_queues=True)
notes = Notes(app)
app.backend_cls = None
app._local.backend = notes
sent = []


def capture(producer, name, message, **options):
    headers, properties, body, _ = message
    headers = dict(headers)
    if options.get("headers"):
        headers.update(options["headers"])
    exchange, routing_key, queue = (options.get(key) for key in ("exchange", "routing_key", "queue"))
    queue = getattr(queue, "name", queue)
    by_exchange = isinstance(exchange, str) and exchange and routing_key
    sent.append(
        json.loads(
            app.backend.encode(
                {
                    "headers": headers,
                    "body": body,
                    "reply_to": properties["reply_to"],
                    "correlation_id": properties["correlation_id"],
                    "priority": options.get("priority") or 0,
                    "expires": options.get("expiration") is not None,
                    "route": [exchange, routing_key] if by_exchange else ["", queue or "rust"],
                }
            )
        )
    )


app.amqp.__dict__["send_task_message"] = capture


@app.task(name="runner", bind=True)
def runner(self, *args, **kwargs):
    """Replaces the code of a running task."""


def s(name, *args, **options):
    immutable = options.pop("immutable", False)
    return app.signature(name, args=args, options=options, immutable=immutable)


def reset():
    messages = list(sent)
    sent.clear()
    sizes = list(notes.sizes)
    notes.sizes.clear()
    return messages, sizes


def run(message, returned):
    """Returns the messages that a worker sends after this message, and the children that it stores."""

    @app.task(name=f"run-{message['headers']['id']}-{returned!r}", lazy=False, trail=True)
    def task(*args, **kwargs):
        return returned

    args, kwargs, embed = message["body"]
    request = dict(message["headers"]) | embed | {"delivery_info": {}, "reply_to": message["reply_to"]}
    request["chord"] = None  # its parts are counted below
    tracer = build_tracer(task.name, task, app=app)
    notes.children = None
    tracer(message["headers"]["id"], args, kwargs, request)
    app.tasks.unregister(task.name)
    messages, sizes = reset()
    return {"sent": messages, "sizes": sizes, "children": json.loads(app.backend.encode(notes.children))}


@contextlib.contextmanager
def running(message):
    """Context of the running task of this message."""
    task = app.tasks["runner"]
    request = dict(message["headers"]) | message["body"][2] | {"delivery_info": {}, "children": []}
    _task_stack.push(task)
    task.push_request(**request, args=(), kwargs={}, called_directly=False)
    try:
        yield task.request
    finally:
        task.pop_request()
        _task_stack.pop()


def body(message, results):
    """Returns the message that the last part of a chord sends."""
    with running(message):
        app.signature(message["body"][2]["chord"]).delay(results)
    messages, sizes = reset()
    return {"sent": messages, "sizes": sizes}


def errbacks(message):
    """Returns the messages that a failed task sends."""
    with running(message) as request:
        app.backend._call_task_errbacks(request, ValueError("no"), None)
    messages, sizes = reset()
    return {"sent": messages, "sizes": sizes}


def plain(value):
    return json.loads(app.backend.encode(value))


def replaced(name, message, replacement):
    """Returns the messages that a task of this message sends when it is replaced."""
    case = {"name": name, "kind": "replace", "message": message, "signature": plain(replacement)}
    with running(copy.deepcopy(message)), contextlib.suppress(Ignore):
        app.tasks["runner"].replace(replacement)
    messages, sizes = reset()
    return case | {"sent": messages, "sizes": sizes}


def grown(name, message, signature):
    """Returns the messages and notes of a task of this message that adds a part to its chord."""
    case = {"name": name, "kind": "add_to_chord", "message": message, "signature": plain(signature)}
    with running(copy.deepcopy(message)):
        app.tasks["runner"].add_to_chord(signature)
    messages, sizes = reset()
    grown, notes.grown = notes.grown, []
    return case | {"sent": messages, "sizes": sizes, "grown": grown}


def first_message(workflow):
    workflow.apply_async()
    messages, _ = reset()
    return next(message for message in messages if message["headers"]["task"] == "a")


def replacement_cases():
    for host, of_host in HOSTS.items():
        for name, of_replacement in REPLACEMENTS.items():
            case = replaced(f"{host}, replaced by {name}", first_message(of_host()), of_replacement())
            yield case
            again = [message for message in case["sent"] if message["headers"]["task"] == "r"]
            if name in ("a task", "a chain"):
                yield replaced(f"{host}, replaced by {name} that is replaced", again[0], s("t", 1))
        if host.startswith("a part of a chord"):
            yield grown(f"{host}, extended", first_message(of_host()), s("r", 1, queue="python"))
            yield grown(f"{host}, extended by a chain", first_message(of_host()), chain(s("r"), s("t")))


def cases(name, workflow):
    signature = plain(workflow)
    result = workflow.apply_async()
    messages, sizes = reset()
    waiting, parts = deque(messages), {}
    expected = dict(map(tuple, sizes))
    sent_by_client = {"signature": signature, "sent": messages, "sizes": sizes, "result": plain(result.as_tuple())}
    found = [{"name": name, "kind": "client"} | sent_by_client]
    while waiting:
        message = waiting.popleft()
        if message["headers"]["task"] == "celery.chord_unlock":
            continue
        returned = f"r-{message['headers']['task']}"
        followed = run(message, returned)
        found.append({"name": name, "kind": "success", "message": message, "returned": returned} | followed)
        waiting.extend(followed["sent"])
        expected |= dict(map(tuple, followed["sizes"]))
        if message["body"][2]["errbacks"]:
            found.append({"name": name, "kind": "failure", "message": message} | errbacks(message))
        if message["body"][2]["chord"]:
            gid = message["headers"]["group"]
            parts.setdefault(gid, []).append(returned)
            if len(parts[gid]) == expected[gid]:
                followed = body(message, parts[gid])
                found.append({"name": name, "kind": "body", "message": message, "returned": parts[gid]} | followed)
                waiting.extend(followed["sent"])
                expected |= dict(map(tuple, followed["sizes"]))
    assert len(found) < 40, (name, len(found))
    return found


def linked(signature, *callbacks, errors=()):
    for callback in callbacks:
        signature.link(callback)
    for errback in errors:
        signature.link_error(errback)
    return signature


WORKFLOWS = {
    "one callback": lambda: linked(s("a"), s("b", 1, queue="python")),
    "one immutable callback": lambda: linked(s("a"), s("b", 1, immutable=True)),
    "several callbacks": lambda: linked(s("a"), s("b"), s("c", priority=5), group(s("d"), s("e"))),
    "a chain as callback": lambda: linked(s("a"), chain(s("b"), s("c"), s("d"))),
    "a group as the only callback": lambda: linked(s("a"), group(s("b"), s("c", immutable=True))),
    "a chord as callback": lambda: linked(s("a"), chord([s("b"), s("c")], s("d"))),
    "a callback with a callback": lambda: linked(s("a"), linked(s("b"), s("c"), errors=[s("e")])),
    "errbacks": lambda: linked(s("a"), errors=[s("b", 7), s("c", immutable=True)]),
    "a chain": lambda: chain(s("a"), s("b", 2), s("c", immutable=True)),
    "a chain with callbacks": lambda: linked(chain(s("a"), s("b")), s("ok"), errors=[s("bad")]),
    "a chain in a chain": lambda: chain(s("a"), chain(s("b"), chain(s("c"), s("d"))), s("e")),
    "a chain that ends in a group": lambda: chain(s("a"), group(s("b"), s("c", 1))),
    "a chain with a group within": lambda: chain(s("a"), group(s("b"), s("c")), s("d"), s("e")),
    "a chain of groups": lambda: chain(s("a"), group(s("b"), s("c")), group(s("d"), s("e")), s("f")),
    "a chain with a chord": lambda: chain(s("a"), chord([s("b"), s("c")], s("d")), s("e")),
    "a chord whose body is a chain": lambda: chain(s("a"), chord([s("b"), s("c")], chain(s("d"), s("e"), s("f")))),
    "a chord whose body is a group": lambda: chain(s("a"), chord([s("b"), s("c")], group(s("d"), s("e")))),
    "a group of chains": lambda: chain(s("a"), group(chain(s("b"), s("c")), chain(s("d"), s("e")), s("f"))),
    "a chord of chains": lambda: chain(s("a"), group(chain(s("b"), s("c")), chain(s("d"), s("e"))), s("f")),
    "a chord of chords": lambda: chain(
        s("a"), group(chord([s("b"), s("c")], s("d")), chord([s("e"), s("f")], s("g"))), s("h")
    ),
    "a chord of chains that end in groups": lambda: chain(
        s("a"), group(chain(s("b"), group(s("c"), s("d"))), s("e")), s("f")
    ),
    "nested groups": lambda: chain(s("a"), group(s("b"), group(s("c"), s("d"), group(s("e"), s("f"))))),
    "nested groups in a chord": lambda: chain(s("a"), group(s("b"), group(s("c"), s("d"))), s("e")),
    "a group of one": lambda: chain(s("a"), group(s("b")), s("c")),
    "an unfrozen chord as callback, with options": lambda: linked(
        s("a"), chord([s("b", queue="python"), s("c")], s("d", queue="python")).set(time_limit=9)
    ),
    "a chord with callbacks": lambda: chain(s("a"), linked(chord([s("b"), s("c")], s("d")), s("ok"), errors=[s("bad")])),
    "options": lambda: chain(
        s("a"),
        s(
            "b",
            queue="python",
            priority=4,
            time_limit=10,
            soft_time_limit=5,
            expires="2099-01-01T00:00:00+00:00",
            eta="2098-01-01T00:00:00+00:00",
            shadow="shown",
            ignore_result=True,
            headers={"x-site": "chile"},
            stamped_headers=["batch"],
            batch=["v"],
        ),
        s("c", exchange="science", routing_key="fast"),
    ),
    "kwargs": lambda: chain(s("a"), app.signature("b", args=[1], kwargs={"k": {"deep": [None, 1.5]}})),
}

HOSTS = {
    "a task": lambda: s("a"),
    "a task with callbacks": lambda: linked(s("a"), s("ok", 1), group(s("x"), s("y")), errors=[s("bad")]),
    "a step of a chain": lambda: chain(s("a"), s("y"), s("z")),
    "a step before a group": lambda: chain(s("a"), group(s("y"), s("z"))),
    "a step before a chord": lambda: chain(s("a"), group(s("x"), s("y")), s("z")),
    "a part of a chord": lambda: chord([s("a"), s("b")], s("z")),
    "a part of a chord that goes on": lambda: chain(group(s("a"), s("b")), s("y"), s("z")),
    "a part of a group": lambda: group(s("a"), s("b")),
}

REPLACEMENTS = {
    "a task": lambda: s("r", 1, queue="python"),
    "a task with callbacks": lambda: linked(s("r"), s("own"), errors=[s("mine")]),
    "a chain": lambda: chain(s("r"), s("t")),
    "a chain with callbacks": lambda: linked(chain(s("r"), s("t")), s("own"), errors=[s("mine")]),
    "a group": lambda: group(s("r"), s("t")),
    "a chord": lambda: chord([s("r"), s("t")], s("u")),
    "a chain that ends in a group": lambda: chain(s("r"), group(s("t"), s("u"))),
    "a chain with a group within": lambda: chain(s("r"), group(s("t"), s("u")), s("v")),
}

# Built with Python's operators; the Rust side builds the same workflows.
COMPOSED = {
    "task | task": lambda: s("a") | s("b"),
    "task | task | task": lambda: s("a") | s("b") | s("c"),
    "task | (task | task)": lambda: s("a") | (s("b") | s("c")),
    "task | group": lambda: s("a") | group(s("b"), s("c")),
    "task | group of one": lambda: s("a") | group(s("b")),
    "task | group | task": lambda: s("a") | group(s("b"), s("c")) | s("d"),
    "task | group | task | task": lambda: s("a") | group(s("b"), s("c")) | s("d") | s("e"),
    "task | group | group": lambda: s("a") | group(s("b"), s("c")) | group(s("d"), s("e")),
    "group | task": lambda: group(s("a"), s("b")) | s("c"),
    "group | group": lambda: group(s("a"), s("b")) | group(s("c"), s("d")),
    "group | task | task": lambda: group(s("a"), s("b")) | s("c") | s("d"),
    "group | (task | task)": lambda: group(s("a"), s("b")) | (s("c") | s("d")),
    "chord | task": lambda: chord([s("a"), s("b")], s("c")) | s("d"),
    "chord | group": lambda: chord([s("a"), s("b")], s("c")) | group(s("d"), s("e")),
    "chord | chord": lambda: chord([s("a"), s("b")], s("c")) | chord([s("d"), s("e")], s("f")),
    "task | chord": lambda: s("a") | chord([s("b"), s("c")], s("d")),
    "task | chord | task": lambda: s("a") | chord([s("b"), s("c")], s("d")) | s("e"),
    "chain(task, task)": lambda: chain(s("a"), s("b")),
    "chain(group, task)": lambda: chain(group(s("a"), s("b")), s("c")),
    "chain(task, chain(task, task), task)": lambda: chain(s("a"), chain(s("b"), s("c")), s("d")),
    "chain(task, group, task)": lambda: chain(s("a"), group(s("b"), s("c")), s("d")),
    "chain(task, empty group, task)": lambda: chain(s("a"), group([]), s("b")),
    "chain(task, group of one, task)": lambda: chain(s("a"), group([s("b")]), s("c")),
    "linked chain | task": lambda: linked(chain(s("a"), s("b")), s("x"), errors=[s("e")]) | s("c"),
}


def main():
    found = [case for name, workflow in WORKFLOWS.items() for case in cases(name, workflow()) if case["sent"]]
    found += replacement_cases()
    found += [
        {"name": name, "kind": "signature", "signature": plain(workflow())} for name, workflow in COMPOSED.items()
    ]
    TARGET.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(case, separators=(",", ":"), sort_keys=True) for case in found)
    TARGET.write_text(f"[\n{lines}\n]\n")
    print(f"{len(found)} cases")


if __name__ == "__main__":
    main()
