"""The two example producers: examples/enqueue.py and `cargo run --example enqueue`."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from support import REPO, clean_environment, service

BROKERS = ["rabbitmq", "redis"]


@pytest.fixture(params=["python", "rust"])
def enqueue(request, deployment, broker):
    """Calls the example with the given arguments."""
    if request.param == "python":
        program = [sys.executable, REPO / "examples" / "enqueue.py"]
    else:
        program = [Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "enqueue"]

    def call(*args, broker_url=broker.url, backend="rpc://"):
        environment = {"CELERY_BROKER_URL": broker_url}
        if backend:
            environment["CELERY_RESULT_BACKEND"] = backend
        return subprocess.run(
            [*program, *map(str, args)],
            cwd=deployment.directory,
            env=clean_environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def first_line(done):
    """The task id, which stands alone on the first line."""
    return str(uuid.UUID(done.stdout.splitlines()[0].strip()))


@pytest.mark.parametrize("backend", ["rpc", "redis"])
def test_waits_for_success(deployment, enqueue, backend):
    deployment.settings(backend)
    deployment.worker()
    transfer = deployment.package()
    url = "rpc://" if backend == "rpc" else service("TEST_REDIS_URL")
    done = enqueue("transfer_files_bbcp", "--id", transfer, "--queue", deployment.queue, "--wait", "30", backend=url)
    assert done.returncode == 0, done
    assert first_line(done)
    assert "SUCCESS" in done.stdout
    deployment.assert_moved(transfer)


def test_waits_for_failure(deployment, enqueue):
    deployment.settings("rpc")
    deployment.worker()
    done = enqueue("transfer_files_bbcp", "--id", 4711, "--queue", deployment.queue, "--wait", "30")
    assert done.returncode == 1
    assert "DataTransferError" in done.stdout + done.stderr
    assert "4711" in done.stdout + done.stderr


def test_does_not_wait(deployment, enqueue, broker):
    done = enqueue("transfer_files_bbcp", "--id", 42, "--queue", deployment.queue, backend=None)
    assert done.returncode == 0, done
    body, headers, _ = broker.get(deployment.queue)
    assert headers["id"] == first_line(done)
    assert headers["task"] == "ccat_data_transfer.transfer_manager.transfer_files_bbcp"
    assert body[0] == [42] or body[1] == {"data_transfer_id": 42}


def test_the_managers_task(deployment, enqueue):
    deployment.settings("rpc")
    deployment.worker()
    transfer = deployment.package()
    done = enqueue("transfer_transfer_packages", "--verbose", "--queue", deployment.queue, "--wait", "30")
    assert done.returncode == 0, done
    deployment.reaches(transfer, "COMPLETED")


def test_without_an_answer_it_fails(deployment, enqueue):
    done = enqueue("transfer_files_bbcp", "--id", 42, "--queue", deployment.queue, "--wait", "1")
    assert done.returncode == 1
    assert first_line(done)
    assert "1" in done.stderr and "Traceback" not in done.stderr


def test_no_broker(enqueue, broker):
    scheme = broker.url.partition(":")[0]
    done = enqueue("transfer_files_bbcp", "--id", 42, broker_url=f"{scheme}://guest:geheim@127.0.0.1:1//")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "geheim" not in done.stdout + done.stderr
