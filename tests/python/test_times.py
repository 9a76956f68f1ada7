"""Times between programs with and without `enable_utc`, and in other time zones."""

import uuid
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from celery import Celery

from support import KINDS, Workers, backend_url, until

BROKERS = ["rabbitmq"]
pytestmark = pytest.mark.timeout(120)

TOKYO = ZoneInfo("Asia/Tokyo")
SETTINGS = [{"enable_utc": False, "timezone": "Asia/Tokyo"}, {"enable_utc": True, "timezone": "Asia/Tokyo"}]


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    # A worker of each kind; Python's has another time zone.
    workers = Workers(tmp_path_factory.mktemp("times"), broker, python=SETTINGS[0], pool="solo")
    yield workers
    workers.close()


@pytest.fixture(params=SETTINGS, ids=["enable_utc=False", "enable_utc=True"])
def producer(request, broker):
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    app.conf.update(request.param)
    yield app
    app.close()


def scheduled(workers, task_id):
    """The time for which a worker holds a task."""

    def found():
        replies = workers.app.control.inspect(timeout=1).scheduled() or {}
        return [task["eta"] for tasks in replies.values() for task in tasks if task["request"]["id"] == task_id]

    [eta] = until(found, "the task is held")
    workers.app.control.revoke(task_id)
    return datetime.fromisoformat(eta)


@pytest.mark.parametrize("kind", KINDS)
def test_eta_and_expiry_mean_the_same_to_both(workers, producer, kind):
    def send(*args, **options):
        return producer.send_task("tasks.echo", args, queue=workers.queues[kind], **options)

    soon = datetime.now(timezone.utc) + timedelta(hours=2)
    assert scheduled(workers, send(1, eta=soon.astimezone(TOKYO)).id) == soon
    # Without an offset, it is UTC for both, whatever the settings are.
    assert scheduled(workers, send(1, eta=soon.replace(tzinfo=None)).id) == soon
    began = datetime.now(timezone.utc)
    eta = scheduled(workers, send(1, countdown=7200).id)
    assert began + timedelta(hours=2) <= eta <= datetime.now(timezone.utc) + timedelta(hours=2)

    past = datetime.now(timezone.utc) - timedelta(hours=1)
    results = {
        "not expired": send(1, expires=3600),
        "not expired in UTC": send(2, expires=(past + timedelta(hours=2)).replace(tzinfo=None)),
        # As headers: with `expires`, the broker itself may discard such a message.
        "expired": send(3, headers={"expires": past.astimezone(TOKYO).isoformat()}),
        "expired in UTC": send(4, headers={"expires": past.replace(tzinfo=None).isoformat()}),
    }
    until(lambda: all(result.ready() for result in results.values()), "the tasks have ended")
    states = {name: result.state for name, result in results.items()}
    assert states == {name: "SUCCESS" if "not" in name else "REVOKED" for name in results}


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_times_of_what_a_worker_sends(workers, producer, kind, other):
    queue, task_id = workers.queues[other], str(uuid.uuid4())
    callback = producer.signature("tasks.echo", queue=queue, countdown=7200, task_id=task_id)
    began = datetime.now(timezone.utc)
    result = producer.send_task("tasks.echo", (1,), queue=workers.queues[kind], link=callback)
    assert result.get(timeout=30) == 1
    ended = datetime.now(timezone.utc)
    assert began + timedelta(hours=2) <= scheduled(workers, task_id) <= datetime.now(timezone.utc) + timedelta(hours=2)
    assert began <= result.date_done.astimezone(timezone.utc) <= ended
