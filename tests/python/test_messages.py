"""Wrong messages: the Rust worker handles them like a real Python worker.

If both workers can run a case, their results are compared.
"""

import json
import uuid

import pytest

from support import SCHEDULE, TRANSFER, backend_url, python_worker, until

BROKERS = ["rabbitmq", "redis"]

NOTHING_EMBEDDED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
JSON = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2}


class Listener:
    """A worker, its queue, and a producer."""

    def __init__(self, broker, queue, app, worker):
        self.broker, self.queue, self.app, self.worker = broker, queue, app, worker

    def finished(self, task_id, seconds=20):
        """The final meta of a task."""

        def meta():
            assert self.worker.running(), f"the worker has ended:\n{self.worker.log()[-3000:]}"
            found = self.app.backend.get(self.app.backend.get_key_for_task(task_id))
            found = json.loads(found) if found else None
            return found if found and found["status"] in ("SUCCESS", "FAILURE", "REVOKED") else None

        return until(meta, f"task {task_id} is finished", seconds)

    def send(self, body, headers=None, **properties):
        self.broker.publish(self.queue, body, headers, **(JSON | properties))

    def call(self, task, args, kwargs):
        """The final meta of a call, sent as Celery sends it."""
        return self.finished(self.app.send_task(task, args, kwargs, queue=self.queue).id)

    def fence(self):
        """Returns once the worker, alive, has handled a message sent after all the others."""
        self.call(TRANSFER, [4711], {})

    def rejected(self):
        """Takes a message off the dead-letter queue, as (raw body, headers), or None."""
        with self.broker.channel() as channel:
            message = channel.basic_get(f"{self.queue}.dead", no_ack=True)
            return message and (message.body, message.headers)

    def rejects(self):
        """Waits until a message is rejected, and returns it from the dead-letter queue, if the broker has one."""
        if self.broker.has_dead_letters:
            return until(self.rejected, "the message is rejected")
        return self.broker.all_settled(self.queue)


@pytest.fixture(scope="module")
def rust(shared_deployment, broker):
    shared_deployment.settings("redis")
    worker = shared_deployment.worker(concurrency=1)
    with shared_deployment.app("redis") as app:
        yield Listener(broker, shared_deployment.queue, app, worker)
    assert worker.running(), worker.log()


@pytest.fixture(scope="module")
def python(broker, tmp_path_factory, shared_deployment):
    queue = f"py{uuid.uuid4().hex[:8]}_buffer_data_transfer"
    broker.declare(queue)
    worker = python_worker(tmp_path_factory.mktemp("peer"), queue, broker, backend_url("redis"))
    with shared_deployment.app("redis") as app:
        yield Listener(broker, queue, app, worker)
    alive = worker.running()
    worker.stop()
    broker.delete(queue)
    assert alive, worker.log()


def headers(task=TRANSFER, task_id=None, **more):
    return {"lang": "py", "task": task, "id": task_id or str(uuid.uuid4())} | more


def body(args=(4711,), kwargs=None):
    return json.dumps([list(args), kwargs or {}, NOTHING_EMBEDDED])


WRONG_ARGUMENTS = {
    "none": (TRANSFER, [], {}),
    "only session": (TRANSFER, [], {"session": None}),
    "too many": (TRANSFER, [1, 2, 3], {}),
    "far too many": (TRANSFER, [1, 2, 3, 4, 5], {}),
    "unknown keyword": (TRANSFER, [1], {"nope": 1}),
    "unknown keyword alone": (TRANSFER, [], {"nope": 1}),
    "twice": (TRANSFER, [1], {"data_transfer_id": 1}),
    "session twice": (TRANSFER, [1, None], {"session": None}),
    "too many and unknown": (TRANSFER, [1, 2, 3], {"nope": 1}),
    "manager: too many": (SCHEDULE, [True, None, 1], {}),
    "manager: unknown keyword": (SCHEDULE, [], {"loud": True}),
    "manager: twice": (SCHEDULE, [True], {"verbose": True}),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(rust, python, case):
    """TypeError with CPython's text, taken from a Python worker that got the same."""
    task, args, kwargs = WRONG_ARGUMENTS[case]
    expected, got = python.call(task, args, kwargs), rust.call(task, args, kwargs)
    assert expected["status"] == "FAILURE" and expected["result"]["exc_type"] == "TypeError"
    assert got["result"] == expected["result"]
    assert (got["status"], set(got)) == (expected["status"], set(expected))
    # People see the last line of the traceback.
    assert got["traceback"].strip().splitlines()[-1] == expected["traceback"].strip().splitlines()[-1]
    assert rust.rejected() is None


@pytest.mark.parametrize("task", ["no.such.task", f"{TRANSFER}_"])
def test_unknown_task(rust, python, task):
    """NotRegistered is stored, and the message is rejected."""
    answers = {}
    for listener in (python, rust):
        task_id = str(uuid.uuid4())
        listener.send(body(), headers(task, task_id))
        answers[listener] = listener.finished(task_id)
        rejected = listener.rejects()
        assert not rejected or rejected[1]["id"] == task_id
    assert answers[rust]["result"]["exc_type"] == "NotRegistered"
    assert answers[rust]["result"] == answers[python]["result"]


def test_unknown_task_raises_at_the_caller(rust):
    from celery.exceptions import NotRegistered

    with pytest.raises(NotRegistered):
        rust.app.send_task("no.such.task", queue=rust.queue).get(timeout=20)
    rust.rejects()


# name: body, headers, properties; the disposition
BAD = {
    "JSON breaks off": ("ack", b"[[4711], {}", headers(), {}),
    "no UTF-8": ("ack", b'[["\xff\xfe"], {}, {}]', headers(), {}),
    "pickle": ("reject", b"\x80\x04N.", headers(), {"content_type": "application/x-python-serialize"}),
    "yaml": ("reject", b"[]", headers(), {"content_type": "application/x-yaml"}),
    "unknown content type": ("reject", b"[]", headers(), {"content_type": "application/x-nope"}),
    "no task": ("reject", b'{"a": 1}', {}, {}),
    "no task, a list": ("reject", b"[1, 2]", {}, {}),
    "eta is not a time": ("reject", body(), headers(eta="soon"), {}),
    "expires is not a time": ("reject", body(), headers(expires="soon"), {}),
    "protocol 1, kwargs is a list": (
        "reject",
        json.dumps({"task": TRANSFER, "id": str(uuid.uuid4()), "args": [1], "kwargs": [1]}),
        {},
        {},
    ),
}


@pytest.mark.parametrize("language", ["python", "rust"])
@pytest.mark.parametrize("case", BAD)
def test_bad_message(request, language, case):
    """Acknowledged or dead-lettered, exactly as by Python, and the worker survives."""
    fate, content, its_headers, properties = BAD[case]
    listener = request.getfixturevalue(language)
    listener.send(content, its_headers, **properties)
    listener.fence()
    if fate == "reject" and (rejected := listener.rejects()):
        raw, _ = rejected
        assert (raw if isinstance(raw, bytes) else raw.encode()) == (
            content if isinstance(content, bytes) else content.encode()
        )
    listener.broker.all_settled(listener.queue)
    assert listener.rejected() is None
    if its_headers:
        assert listener.app.backend.get_task_meta(its_headers["id"])["status"] == "PENDING", "no result is stored"


# These messages end a Python worker; see the table of deliberate differences in docs/compatibility.md.
DEADLY = {
    "empty body": (b"", True),
    "null": (b"null", True),
    "one element": (b"[[4711]]", True),
    "four elements": (b"[[4711], {}, {}, {}]", True),
    "a number": (b"42", True),
    "no id": (body(), False),
}


@pytest.mark.parametrize("case", DEADLY)
def test_message_that_kills_python(rust, case):
    """The worker survives and the message is not redelivered; a result is stored if the message has an id."""
    content, has_id = DEADLY[case]
    its_headers = headers()
    task_id = its_headers["id"]
    if not has_id:
        del its_headers["id"]
    rust.send(content, its_headers)
    rust.fence()
    rust.broker.all_settled(rust.queue)
    if not has_id:
        rust.rejects()
    while rust.rejected():
        pass
    if has_id and content:
        meta = rust.finished(task_id)
        assert (meta["status"], meta["result"]["exc_type"]) == ("FAILURE", "InvalidTaskError")


def test_no_content_type(rust):
    rust.broker.publish(rust.queue, body(), headers(), delivery_mode=2)
    rust.fence()
    rust.broker.all_settled(rust.queue)
    while rust.rejected():
        pass


@pytest.mark.parametrize("language", ["python", "rust"])
def test_arguments_of_another_kind(request, language):
    """Protocol 2 with a number for args: TypeError."""
    listener = request.getfixturevalue(language)
    its_headers = headers()
    listener.send(json.dumps([5, {}, NOTHING_EMBEDDED]), its_headers)
    meta = listener.finished(its_headers["id"])
    assert (meta["status"], meta["result"]["exc_type"]) == ("FAILURE", "TypeError")


@pytest.mark.parametrize("language", ["python", "rust"])
def test_expired(request, language):
    listener = request.getfixturevalue(language)
    its_headers = headers(expires="2001-01-01T00:00:00+00:00")
    listener.send(body(), its_headers)
    meta = listener.finished(its_headers["id"])
    assert (meta["status"], meta["result"]["exc_type"]) == ("REVOKED", "TaskRevokedError")
    assert meta["result"]["exc_message"] == ["expired"]


@pytest.mark.parametrize("language", ["python", "rust"])
def test_protocol_1(request, language):
    """The old form is accepted as well."""
    listener = request.getfixturevalue(language)
    task_id = str(uuid.uuid4())
    listener.send(json.dumps({"task": TRANSFER, "id": task_id, "args": [1, 2, 3], "kwargs": {}}))
    assert listener.finished(task_id)["result"]["exc_type"] == "TypeError"


@pytest.mark.parametrize("wrong", ["42", None, 1.5, [1], {"a": 1}, True, -1])
def test_id_that_is_none(rust, wrong):
    """An id of another type or range: a FAILURE that names the fault, and the worker survives."""
    meta = rust.call(TRANSFER, [wrong], {})
    assert meta["status"] == "FAILURE"
    assert meta["result"]["exc_message"][0]
    rust.fence()


def test_unicode_in_arguments(rust, python):
    """The error's text contains names of keywords unchanged."""
    kwargs = {"größe": 1}
    assert rust.call(TRANSFER, [1], kwargs)["result"] == python.call(TRANSFER, [1], kwargs)["result"]
