"""A Python producer sends a transfer by name and gets the same result as from a Python worker."""

import json
import re
import sys
import types
import uuid

import pytest
import redis

from support import MB, SCHEDULE, TRANSFER, service

BROKERS = ["rabbitmq", "redis"]

CALLS = {
    "by position": lambda id: ([id], {}),
    "by keyword": lambda id: ([], {"data_transfer_id": id}),
    "session by position": lambda id: ([id, None], {}),
    "session by keyword": lambda id: ([id], {"session": None}),
    "all by keyword": lambda id: ([], {"data_transfer_id": id, "session": None}),
}


@pytest.fixture(params=["rpc", "redis"])
def backend(request):
    return request.param


@pytest.fixture
def deployment(deployment, backend):
    deployment.settings(backend)
    return deployment


@pytest.mark.parametrize("call", CALLS)
def test_success(deployment, backend, call):
    deployment.worker()
    transfer = deployment.package()
    args, kwargs = CALLS[call](transfer)
    with deployment.app(backend) as app:
        result = app.send_task(TRANSFER, args, kwargs, queue=deployment.queue)
        assert result.get(timeout=30) is None
        assert result.state == "SUCCESS"
    deployment.assert_moved(transfer)
    assert deployment.outcomes(transfer) == ["completed"]
    assert len(deployment.copies()) == 1


@pytest.mark.parametrize("name", ["transfer_files_bbcp", "execute_transfer"])
def test_every_name_of_the_task_works(deployment, backend, name):
    deployment.worker()
    transfer = deployment.package()
    with deployment.app(backend) as app:
        task = f"ccat_data_transfer.transfer_manager.{name}"
        assert app.send_task(task, [transfer], queue=deployment.queue).get(timeout=30) is None
    deployment.assert_moved(transfer)


FAILURES = {
    # injection: the exception, the row afterwards
    "refused": ("NetworkError", "PENDING"),
    "segv-sink@50%": ("SegmentationFaultError", "PENDING"),
    "enospc@40%": ("StorageError", "PENDING"),
    "corrupt:1000": ("ChecksumVerificationError", "PENDING"),
    "auth": ("ConfigurationError", "FAILED"),
}


@pytest.mark.parametrize("plan", FAILURES)
def test_failure_has_the_class_of_that_name(deployment, backend, plan, monkeypatch):
    exception, status = FAILURES[plan]
    # A producer with the Python package gets the package's classes; otherwise celery creates a class.
    module = types.ModuleType("ccat_data_transfer.exceptions")
    setattr(module, exception, type(exception, (Exception,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    deployment.double(PLAN=plan, ACCEPT=0.1)
    deployment.worker()
    transfer = deployment.package()
    with deployment.app(backend) as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        with pytest.raises(Exception) as raised:
            result.get(timeout=30)
        assert result.state == "FAILURE"
        assert f"{exception}: " in result.traceback.splitlines()[-1]
    assert type(raised.value) is getattr(module, exception)
    assert str(raised.value)

    row = deployment.row(transfer)
    assert (row["status"], row["retry_count"]) == (status, 1 if status == "PENDING" else 0)
    assert row["failure_error_message"]
    assert deployment.temporary_files() == []
    assert not (deployment.destination / row["relative_path"]).exists()
    assert deployment.leases() == []


def test_a_callers_own_class_is_raised(deployment, backend, monkeypatch):
    """If the Python package is installed, its class is raised, and not one that celery created."""
    exceptions = types.ModuleType("ccat_data_transfer.exceptions")
    exceptions.DataTransferError = type("DataTransferError", (Exception,), {"__module__": exceptions.__name__})
    monkeypatch.setitem(sys.modules, exceptions.__name__, exceptions)
    deployment.worker()
    with deployment.app(backend) as app, pytest.raises(exceptions.DataTransferError, match="4711"):
        app.send_task(TRANSFER, [4711], queue=deployment.queue).get(timeout=30)


def test_unknown_id(deployment, broker, backend):
    """A clear error, and the message is removed from the queue."""
    deployment.worker()
    with deployment.app(backend) as app:
        result = app.send_task(TRANSFER, [4711], queue=deployment.queue)
        with pytest.raises(Exception, match="4711") as raised:
            result.get(timeout=30)
    assert type(raised.value).__name__ == "DataTransferError"
    broker.all_settled(deployment.queue)
    assert broker.ready(f"{deployment.queue}.dead") == 0
    assert deployment.copies() == []


def test_origin_missing(deployment, backend):
    deployment.worker()
    transfer = deployment.package()
    (deployment.origin / deployment.row(transfer)["relative_path"]).unlink()
    with deployment.app(backend) as app, pytest.raises(Exception, match="does not exist") as raised:
        app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30)
    assert type(raised.value).__name__ == "DataTransferError"
    assert deployment.status(transfer) == "FAILED"


def test_the_destination_has_another_file(deployment, backend):
    deployment.worker()
    transfer = deployment.package()
    theirs = deployment.destination / deployment.row(transfer)["relative_path"]
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    with deployment.app(backend) as app, pytest.raises(Exception) as raised:
        app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30)
    assert type(raised.value).__name__ == "DestinationFileExistsError"
    assert theirs.read_bytes() == b"precious"
    assert deployment.status(transfer) == "FAILED"


def test_the_destination_has_the_same_file(deployment, backend):
    deployment.worker()
    transfer = deployment.package()
    name = deployment.row(transfer)["relative_path"]
    (deployment.destination / name).parent.mkdir(parents=True)
    (deployment.destination / name).write_bytes((deployment.origin / name).read_bytes())
    with deployment.app(backend) as app:
        assert app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30) is None
    deployment.assert_moved(transfer)


def test_started_comes_first(deployment, backend):
    """STARTED with process id and node name, then the progress of the copy if it takes long, and SUCCESS."""
    worker = deployment.worker()
    transfer = deployment.package()
    task_id = str(uuid.uuid4())
    with deployment.app(backend) as app:
        if backend == "redis":
            client = redis.Redis.from_url(service("TEST_REDIS_URL"))
            channel = client.pubsub(ignore_subscribe_messages=True)
            channel.subscribe(f"celery-task-meta-{task_id}")
            channel.get_message(timeout=5)  # the subscription itself
            app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id=task_id)
            metas = []
            while not metas or metas[-1]["status"] in ("STARTED", "PROGRESS"):
                message = channel.get_message(ignore_subscribe_messages=True, timeout=20)
                assert message is not None, metas
                metas.append(json.loads(message["data"]))
            channel.close()
            client.close()
        else:
            metas = []
            result = app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id=task_id)
            result.get(timeout=30, on_message=metas.append)
    assert [meta["status"] for meta in metas if meta["status"] != "PROGRESS"] == ["STARTED", "SUCCESS"]
    assert metas[0]["result"]["pid"] == worker.pid
    assert metas[0]["result"]["hostname"].startswith(f"rust-{deployment.origin_site}@")
    assert metas[0]["date_done"] is None


def test_meta_has_exactly_celerys_keys(deployment, backend):
    if backend != "redis":
        pytest.skip("only Redis keeps it to look at")
    deployment.worker()
    good, bad = deployment.package(), 4711
    with deployment.app(backend) as app:
        results = [app.send_task(TRANSFER, [id], queue=deployment.queue) for id in (good, bad)]
        results[0].get(timeout=30)
        with pytest.raises(Exception, match="4711"):
            results[1].get(timeout=30)
    with redis.Redis.from_url(service("TEST_REDIS_URL")) as client:
        for result, status in zip(results, ["SUCCESS", "FAILURE"]):
            key = f"celery-task-meta-{result.id}"
            meta = json.loads(client.get(key))
            assert set(meta) == {"status", "result", "traceback", "children", "date_done", "task_id"}
            assert (meta["status"], meta["task_id"], meta["children"]) == (status, result.id, [])
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", meta["date_done"])
            assert 86000 < client.ttl(key) <= 86400
            if status == "FAILURE":
                assert set(meta["result"]) == {"exc_type", "exc_message", "exc_module"}
                assert isinstance(meta["result"]["exc_message"], list)
                assert meta["traceback"].startswith("Traceback (most recent call last):")


def test_ignore_result(deployment, backend):
    """A producer that wants no result gets none, and the transfer runs."""
    deployment.worker()
    transfer = deployment.package()
    with deployment.app(backend) as app:
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue, ignore_result=True)
        deployment.reaches(transfer, "COMPLETED")
        if backend == "redis":
            deployment.broker.all_settled(deployment.queue)
            assert app.backend.get_task_meta(result.id)["status"] == "PENDING"


def test_the_managers_task(deployment, backend):
    """transfer_transfer_packages as a task: it schedules transfers, and this worker then runs them."""
    deployment.worker()
    transfer = deployment.package(size=MB)
    with deployment.app(backend) as app:
        for kwargs in ({"verbose": True}, {}, {"verbose": False, "session": None}):
            result = app.send_task(SCHEDULE, [], kwargs, queue=deployment.queue)
            assert result.get(timeout=30) is None
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 1
