"""Callbacks, chains, groups and chords across a Rust and a Python worker: the results do not depend on the worker."""

import contextlib
import json
import uuid

import pytest
from celery import chain, chord, group

from support import Workers, backend_url, tasks_worker, until
from test_tasks import ended

BROKERS = ["rabbitmq", "redis"]
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    workers = Workers(tmp_path_factory.mktemp("canvas"), broker, pool="solo")
    yield workers
    workers.close()


class Maker:
    """Makes signatures; each letter of `mix` names the worker that runs the next one."""

    def __init__(self, workers, mix):
        self.workers, self.mix, self.made = workers, mix, 0

    def __call__(self, task, *args, **options):
        kind = {"p": "python", "r": "rust"}[self.mix[self.made % len(self.mix)]]
        self.made += 1
        options = {"queue": self.workers.queues[kind]} | options
        return self.workers.app.signature(f"tasks.{task}", args=args, options=options)


# The results are those of Celery alone, which runs each of them first ("p").
WORKFLOWS = {
    "chain": lambda s: chain(s("echo", 1), s("add", 2), s("add", 3)),
    "immutable steps": lambda s: chain(s("echo", 1), s("add", 2, 2).set(immutable=True), s("add", 3)),
    "group of 20": lambda s: group(s("add", i, 1) for i in range(20)),
    "chord": lambda s: chord([s("add", 1, 1), s("add", 2, 2)], s("echo")),
    "chord of one": lambda s: chord([s("add", 1, 1)], s("echo")),
    "large chord": lambda s: chord([s("echo", i) for i in range(40)], s("echo")),
    "chord after a step": lambda s: chain(s("echo", 1), group(s("add", 1), s("add", 2)), s("echo")),
    "steps after a chord": lambda s: chain(chord([s("echo", 1), s("echo", 2)], s("echo")), s("echo"), s("echo")),
    "chord with a chain as body": lambda s: chain(
        s("echo", 1), chord([s("add", 1), s("add", 2)], chain(s("echo"), s("echo")))
    ),
    "chord with a group as body": lambda s: chain(
        s("echo", 1), chord([s("add", 1), s("add", 2)], group(s("echo"), s("echo")))
    ),
    "chord of chains": lambda s: chord([chain(s("echo", i), s("add", 1), s("add", 1)) for i in range(3)], s("echo")),
    "chord of chords": lambda s: chord([chord([s("echo", i), s("echo", i)], s("echo")) for i in range(2)], s("echo")),
    "chord of chords after a step": lambda s: chain(
        s("echo", 1), group(chord([s("add", 1), s("add", 2)], s("echo")), s("add", 3)), s("echo")
    ),
    "chain that ends in a group": lambda s: chain(s("echo", 1), group(s("add", 1), s("add", 2))),
    "chain of groups": lambda s: chain(
        s("echo", 1), group(s("add", 1), s("add", 2)), group(s("echo"), s("echo")), s("echo")
    ),
    "group of chains": lambda s: chain(s("echo", 1), group(chain(s("add", 1), s("add", 1)), s("add", 5))),
    "nested groups": lambda s: chain(s("echo", 1), group(s("add", 1), group(s("add", 2), s("add", 3)))),
    "nested groups in a chord": lambda s: chain(
        s("echo", 1), group(s("add", 1), group(s("add", 2), s("add", 3))), s("echo")
    ),
    "chord of chains that end in groups": lambda s: chord(
        [chain(s("echo", 1), group(s("add", 1), s("add", 2))), s("echo", 9)], s("echo")
    ),
    "retries in a chord": lambda s: chord([s("retry", 2, 0.1), s("echo", 1)], s("echo")),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_both_workers_give_the_same_result(workers, name):
    def run(mix):
        return WORKFLOWS[name](Maker(workers, mix)).apply_async().get(timeout=30)

    expected = run("p")
    for mix in ["r", "pr", "rp", "prr", "rpp"]:
        assert run(mix) == expected, mix


@contextlib.contextmanager
def record(workers):
    """A queue that only the test reads, to see each message and its number."""
    queue = f"record{uuid.uuid4().hex[:8]}"
    workers.broker.declare(queue)

    def take(count):
        """Returns all messages when there are `count`, after a short wait for duplicates."""
        until(lambda: workers.broker.ready(queue) >= count, f"{count} messages in {queue}")
        found = []
        while message := workers.broker.get(queue):
            found.append(message)
        return found

    def signature(name, *args, **options):
        return workers.app.signature(name, args=args, options={"queue": queue} | options)

    try:
        yield signature, take
    finally:
        workers.broker.delete(queue)


def shape(message, ids):
    """A message without values that differ from run to run; ids by name, or by their order."""
    body, headers, properties = message
    headers = {k: v for k, v in headers.items() if k not in ("origin", "lang")}
    known = dict(ids)

    def name(value):
        match value:
            case str() if len(value) == 36 and value.count("-") == 4:
                return known.setdefault(value, f"#{len(known)}")
            case str():
                for id, named in known.items():
                    value = value.replace(id, named)
                return value
            case dict():
                return {key: name(one) for key, one in value.items()}
            case list():
                return [name(one) for one in value]
            case _:
                return value

    properties = {key: properties.get(key) for key in ("correlation_id", "priority", "delivery_mode", "content_type")}
    return name([headers["id"], body, headers, properties])


def linked(signature, callbacks=(), errbacks=()):
    for callback in callbacks:
        signature.link(callback)
    for errback in errbacks:
        signature.link_error(errback)
    return signature


VARIANTS = {
    "link": (1, "echo", lambda s: {"callbacks": [s("first", 7)]}),
    "links": (2, "echo", lambda s: {"callbacks": [s("first"), s("second", priority=3)]}),
    "a group as link": (3, "echo", lambda s: {"callbacks": [group(s("a"), s("b")), s("c").set(immutable=True)]}),
    "link_error": (1, "fail", lambda s: {"errbacks": [s("first", 7)]}),
    "link_errors": (2, "fail", lambda s: {"errbacks": [s("first"), s("second").set(immutable=True)], "callbacks": [s("no")]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_links_fire_once_and_as_with_python(workers, variant):
    count, task, links = VARIANTS[variant]
    shapes = {}
    for kind in ["python", "rust"]:
        with record(workers) as (signature, take):
            main = workers.app.signature(f"tasks.{task}", args=("x",), options={"queue": workers.queues[kind]})
            result = linked(main, **links(signature)).apply_async()
            ended(result)
            messages = take(count)
            assert len(messages) == count
            children = result.backend.get_task_meta(result.id)["children"]
            # Sorted by name, because Python's workers may send them in another order.
            messages.sort(key=lambda message: message[1]["task"])
            ids = {result.id: "main"}
            shapes[kind] = [shape(message, ids) for message in messages]
            shapes[kind].append([child[1] and len(child[1]) for child in children])
    assert shapes["rust"] == shapes["python"]


def outcome(result):
    """State and exception of a result, with the ids in it left out."""
    ended(result)
    stored = result.backend.get_task_meta(result.id)
    value = stored["result"]
    if isinstance(value, BaseException):
        args = json.dumps(value.args).replace(result.id, "ID")
        words = ["TASK" if len(word) == 36 and word.count("-") == 4 else word for word in args.split()]
        value = (type(value).__module__, type(value).__name__, " ".join(words))
    return stored["status"], value


FAILURES = {
    "chain": lambda s: chain(s("echo", "no"), s("fail"), s("echo"), s("echo")),
    "chord": lambda s: chord([s("echo", 1), s("fail", "no"), s("echo", 2)], s("echo")),
    "chord of two failures": lambda s: chord([s("fail", "one"), s("echo", 1), s("fail", "two", "KeyError")], s("echo")),
    "chord with a chain that fails": lambda s: chord([chain(s("fail", "no"), s("echo")), s("echo", 1)], s("echo")),
    "steps after a failed chord": lambda s: chain(chord([s("fail", "no"), s("echo", 1)], s("echo")), s("echo"), s("echo")),
    "chord in a chain that fails": lambda s: chain(s("fail", "no"), chord([s("echo"), s("echo")], s("echo"))),
    "body that fails": lambda s: chord([s("echo", "a"), s("echo", "b")], s("fail", "KeyError").set(immutable=True)),
    "chord with groups that fails": lambda s: chord(
        [chain(s("echo", "x"), group(s("echo"), s("fail"))), s("echo", 9)], s("echo")
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_arrive_as_with_python(workers, name):
    def run(mix):
        with record(workers) as (signature, take):
            workflow = FAILURES[name](Maker(workers, mix))
            workflow.link_error(signature("errback"))
            found = outcome(workflow.apply_async())
            messages = take(1)
            return found, sorted(message[1]["task"] for message in messages)

    expected = run("p")
    assert (expected[0][0], expected[1]) == ("FAILURE", ["errback"])
    for mix in ["r", "pr", "rp"]:
        assert run(mix) == expected, mix


@pytest.mark.parametrize("errbacks", [1, 2])
def test_errbacks_of_a_failed_body_are_its_children(workers, errbacks):
    """They are sent before the failure is stored."""

    def run(mix):
        with record(workers) as (signature, take):
            s = Maker(workers, mix)
            body = s("echo")
            for n in range(errbacks):
                body.link_error(signature(f"errback{n}").set(immutable=True))
            result = chord([s("echo", 1), s("fail", "no")], body).apply_async()
            until(lambda: result.state == "FAILURE", "the body fails")
            # Without a wait: the messages are there when the failure is.
            assert workers.broker.ready(signature("x").options["queue"]) == errbacks
            children = result.backend.get_task_meta(result.id)["children"]
            sent = sorted(message[1]["id"] for message in take(errbacks))
            return children, sent

    for mix in ["p", "r", "rp", "pr"]:
        children, sent = run(mix)
        [[_, members]] = children
        assert sorted(task_id for (task_id, _), _ in members) == sent, mix


def test_a_body_that_is_a_group_fails_as_a_whole(workers):
    def run(mix):
        s = Maker(workers, mix)
        result = chord([s("echo", 1), s("fail", "no")], group(s("echo"), s("echo"))).apply_async()
        return [outcome(member) for member in result.results]

    expected = run("p")
    assert [status for status, _ in expected] == ["FAILURE", "FAILURE"]
    assert run("r") == expected


def test_a_chord_with_a_failed_inner_chord_fails(workers):
    """Celery's chord waits for ever; this one fails."""
    s = Maker(workers, "r")
    inner = chord([s("echo", 1), s("fail", "no")], s("echo"))
    result = chord([inner, s("echo", 2)], s("echo")).apply_async()
    status, (_, exception, text) = outcome(result)
    assert (status, exception) == ("FAILURE", "ChordError")
    assert "Dependency TASK raised ChordError(" in text


def foreign_hash(client, key):
    client.hset(key, "of", "another program")


def unreadable_text(client, key):
    client.set(key, "{")


FOREIGN_VALUES = {
    "hash for a step": (foreign_hash, lambda s, step: chain(s("fail", "no"), step)),
    "hash for a part": (foreign_hash, lambda s, step: chord([chain(s("fail", "no"), step), s("echo", 1)], s("echo"))),
    "text for a part": (unreadable_text, lambda s, step: chord([chain(s("fail", "no"), step), s("echo", 1)], s("echo"))),
}


@pytest.mark.parametrize("name", FOREIGN_VALUES)
def test_a_foreign_value_under_the_key_of_a_result_does_not_hold_the_message(workers, name):
    """The step that was not sent has no result then, which no retry would change. Everything else ends as usual."""
    put, workflow = FOREIGN_VALUES[name]
    s, client, step_id = Maker(workers, "r"), workers.app.backend.client, str(uuid.uuid4())
    put(client, f"celery-task-meta-{step_id}")
    try:
        result = workflow(s, s("echo").set(task_id=step_id)).apply_async()
        if result.id != step_id:
            status, (_, exception, _) = outcome(result)
            assert (status, exception) == ("FAILURE", "ChordError")
        workers.broker.all_settled(workers.queues["rust"])
    finally:
        client.delete(f"celery-task-meta-{step_id}")


def test_only_the_mark_of_a_chord_remains_in_redis(workers):
    s = Maker(workers, "r")
    client = workers.app.backend.client
    before = set(client.keys("celery-taskset-meta-*"))
    result = chord([s("echo", 1), s("echo", 2)], s("echo")).apply_async()
    assert result.get(timeout=20) == [1, 2]
    gid = result.parent.id

    def left():
        return {key.decode() for key in set(client.keys("celery-taskset-meta-*")) - before}

    until(lambda: left() == {f"celery-taskset-meta-{gid}.c"}, "the chord is cleared away")
    assert client.get(f"celery-taskset-meta-{gid}.c") == b"done"


def test_a_signature_that_cannot_be_applied_fails_the_task(workers):
    send = workers.app.send_task
    queue = workers.queues["rust"]
    for callback, says in [({"task": 7}, "InvalidTaskError"), ({"task": "x", "options": {"serializer": "pickle"}}, "EncodeError")]:
        result = send("tasks.echo", [1], queue=queue, link=callback)
        status, value = outcome(result)
        assert (status, value[1]) == ("FAILURE", says)
    result = send("tasks.echo", [1], queue=queue, link={"task": "x", "options": {"exchange": "nowhere", "routing_key": "x"}})
    status, value = outcome(result)
    assert (status, value[1]) == ("FAILURE", "OperationalError")
    # The worker still runs tasks.
    assert send("tasks.echo", [2], queue=queue).get(timeout=20) == 2


def test_chord_unlock(workers):
    """A chord on a database needs a task here, which polls until all parts are done."""
    send, queue = workers.app.send_task, workers.queues["rust"]

    def unlock(results, **kwargs):
        body = workers.app.signature("tasks.echo", options={"queue": queue, "task_id": str(uuid.uuid4())})
        kwargs = {"result": [result.as_tuple() for result in results], "interval": 0.2} | kwargs
        send("celery.chord_unlock", [str(uuid.uuid4()), body], kwargs, queue=queue)
        return workers.app.AsyncResult(body.options["task_id"])

    slow = [send("tasks.sleep", [0.5], queue=queue), send("tasks.echo", ["b"], queue=queue)]
    assert unlock(slow).get(timeout=20) == [0.5, "b"]

    failed = send("tasks.fail", ["no"], queue=queue)
    body = unlock([slow[0], failed])
    status, value = outcome(body)
    assert (status, value[1]) == ("FAILURE", "ChordError")
    assert "Dependency TASK raised ValueError('no')" in value[2]

    never = workers.app.AsyncResult(str(uuid.uuid4()))
    status, value = outcome(unlock([never], max_retries=2))
    assert (status, value[1]) == ("FAILURE", "ChordError")
    assert "chord_unlock could not be retried" in value[2]


def test_builtin_tasks_are_not_shown(workers):
    (names,) = (
        reply
        for node, reply in workers.app.control.inspect(timeout=3).registered().items()
        if workers.queues["rust"] in node
    )
    assert not [name for name in names if name.startswith("celery.")]


# ---------------------------------------------------------------- workers and brokers that stop


def test_a_worker_that_dies_in_a_chord(tmp_path, workers):
    """The next worker runs its parts again, and each is counted once."""
    queue = f"dies{uuid.uuid4().hex[:8]}"
    url = backend_url("redis")

    def s(task, *args):
        return workers.app.signature(f"tasks.{task}", args=args, options={"queue": queue})

    options = {f"broker_transport_options__{k}": v for k, v in workers.broker.transport_options.items()}
    first = tasks_worker(tmp_path, queue, workers.broker, url, "-c", "4", **options)
    try:
        result = chord([s("echo", "a"), s("sleep", 2), s("echo", "b"), s("sleep", 2)], s("echo")).apply_async()
        parts = result.parent.results
        until(lambda: parts[0].state == parts[2].state == "SUCCESS", "the quick ones are done")
        first.kill()
        assert not result.ready()
        first = tasks_worker(tmp_path, queue, workers.broker, url, "-c", "4", **options)
        assert result.get(timeout=30) == ["a", 2, "b", 2]
    finally:
        first.stop()
        workers.broker.delete(queue)


@pytest.mark.stops_the_broker
def test_follow_up_tasks_wait_for_the_broker(tmp_path, workers):
    """A task ends while the broker is unreachable: its callback is sent once, when the broker is reachable again."""
    queue = f"away{uuid.uuid4().hex[:8]}"
    worker = tasks_worker(tmp_path, queue, workers.broker, backend_url("redis"))
    try:
        with record(workers) as (signature, take):
            main = workers.app.signature("tasks.sleep", args=(2,), options={"queue": queue})
            result = linked(main, [signature("callback")]).apply_async()
            until(lambda: result.state == "STARTED", "it runs")
            workers.broker.power("stop")
            worker.says("was not sent", 30)
            assert result.state != "SUCCESS", "the callback comes first"
            workers.broker.power("start")
            assert result.get(timeout=60) == 2
            assert len(take(1)) == 1
    finally:
        workers.broker.power("start")
        worker.stop()
        workers.broker.delete(queue)


# ---------------------------------------------------------------- rpc


@pytest.fixture(scope="module")
def rpc_workers(tmp_path_factory, broker):
    workers = Workers(tmp_path_factory.mktemp("canvas-rpc"), broker, backend=backend_url("rpc"), pool="solo")
    yield workers
    workers.close()


@pytest.mark.parametrize("mix", ["p", "r", "pr", "rp"])
def test_through_rpc(rpc_workers, mix):
    s = Maker(rpc_workers, mix)
    assert chain(s("echo", 1), s("add", 2), s("add", 3)).apply_async().get(timeout=20) == 6
    assert group(s("add", i, i) for i in range(6)).apply_async().get(timeout=20) == [0, 2, 4, 6, 8, 10]
    result = chain(s("echo", 1), group(s("add", 1), s("add", 2))).apply_async()
    assert result.get(timeout=20) == [2, 3]


@pytest.mark.parametrize("mix", ["p", "r", "pr", "rp"])
def test_the_rest_of_a_chain_fails_through_rpc(rpc_workers, mix):
    s = Maker(rpc_workers, mix)
    result = chain(s("echo", "no"), s("fail"), s("echo")).apply_async()
    with pytest.raises(ValueError, match="no"):
        result.get(timeout=20)


def test_there_are_no_chords_through_rpc(rpc_workers):
    s = Maker(rpc_workers, "r")
    body = chord([s("echo", 1), s("echo", 2)], s("echo"))
    result = s("echo", 1).apply_async(link=body)
    with pytest.raises(NotImplementedError):
        result.get(timeout=20)
