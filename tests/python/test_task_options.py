"""What a task can state about itself, and see of its message: automatic retries, a soft time limit that it catches, its
message's properties, its parameters. Each test runs with both kinds of worker."""

import pytest

from support import KINDS, Workers, events, types, until

BROKERS = ["rabbitmq", "redis"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    workers = Workers(tmp_path_factory.mktemp("task-options"), broker)
    yield workers
    workers.close()


def test_a_task_sees_its_message_and_its_limits(workers):
    seen = {}
    for kind in KINDS:
        options = {"app_id": "a-1", "message_id": "m-1", "type": "a type", "priority": 3}
        seen[kind] = workers.send(kind, "request", **options).get(timeout=30)
        assert seen[kind].pop("routing_key") == workers.queues[kind]
        limited = workers.send(kind, "request", time_limit=9, soft_time_limit=8).get(timeout=30)
        assert (limited["time_limit"], limited["soft_time_limit"], limited["app_id"]) == (9, 8, None)
    # Python shows the task's own limits only if the producer sends them. They apply in either case.
    limits = {name: [seen[kind].pop(name) for kind in KINDS] for name in ("time_limit", "soft_time_limit")}
    assert limits == {"time_limit": [None, 60], "soft_time_limit": [None, 45]}
    assert seen["rust"] == seen["python"]
    assert seen["rust"]["app_id"] == "a-1"


@pytest.mark.parametrize("kind", KINDS)
def test_named_exceptions_are_retried_with_a_growing_pause(workers, kind):
    assert workers.send(kind, "autoretry", 1, "ConnectionResetError").get(timeout=30) == 1
    with events(workers.app) as seen:
        result = workers.send(kind, "autoretry", 9, "ConnectionError")
        with pytest.raises(ConnectionError, match="temporary failure"):
            result.get(timeout=30)
        until(lambda: "task-failed" in types(seen, uuid=result.id), "the event of the end")
    # Then no retries are left.
    retried = [event["traceback"] for event in list(seen) if event.get("uuid") == result.id and "retried" in event["type"]]
    pauses = [traceback.splitlines()[-1].removeprefix("celery.exceptions.Retry: ") for traceback in retried]
    assert pauses == [f"Retry in {seconds}s: ConnectionError('temporary failure')" for seconds in (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_other_exceptions_are_not_retried(workers, kind, error):
    result = workers.send(kind, "autoretry", 1, error.__name__)
    with pytest.raises(error, match="temporary failure"):
        result.get(timeout=30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_can_catch_its_soft_time_limit(workers, kind):
    assert workers.send(kind, "guarded", 0.1, soft_time_limit=20).get(timeout=30) == "slept"
    assert workers.send(kind, "guarded", 60, soft_time_limit=1).get(timeout=40) == "caught"


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_caught_its_soft_time_limit_can_be_terminated(workers, kind):
    result = workers.send(kind, "guarded", 60, 60, soft_time_limit=1)
    until(lambda: result.state == "CAUGHT", "the task has caught its limit")
    workers.app.control.terminate(result.id)
    until(lambda: result.state == "REVOKED", "the task is terminated")


@pytest.mark.parametrize("kwargs", [{}, {"y": 1, "z": 2}, {"x": 3}, {"y": 1, "w": 2}], ids=str)
@pytest.mark.parametrize("args", [[], [1], [1, 2]], ids=str)
def test_keyword_only_parameters_are_bound_as_in_python(workers, args, kwargs):
    def outcome(kind):
        result = workers.send(kind, "keyword_only", *args, kwargs=kwargs)
        try:
            return result.get(timeout=30)
        except TypeError as error:
            return str(error)

    assert outcome("rust") == outcome("python")
