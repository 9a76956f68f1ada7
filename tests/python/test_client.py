"""The Rust client sends to a Python worker and reads its results, over every kind of result backend."""

import json
import subprocess
import uuid
from pathlib import Path

import pytest

from support import python_worker, service

pytestmark = pytest.mark.timeout(240)

BROKERS = ["rabbitmq", "redis"]


def backends(tmp_path):
    return {
        "rpc": "rpc://",
        "redis": service("TEST_REDIS_URL"),
        "database": f"db+sqlite:///{tmp_path}/results.sqlite",
    }


@pytest.mark.parametrize("kind", ["rpc", "redis", "database"])
def test_client_gets_what_a_python_worker_returns(kind, tmp_path, broker):
    backend = backends(tmp_path)[kind]
    queue = f"client{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = python_worker(tmp_path, queue, broker, backend, pool="solo")
    try:
        program = Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "send_workflows"
        done = subprocess.run([program, broker.url, backend, queue], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr + worker.log()
        found = json.loads(done.stdout)
    finally:
        worker.kill()
    assert found == {
        "add": 5,
        "chain": 112,
        "step": 12,
        "group": [0, 2, 4, 6, 8],
        "error": "ValueError: no",
        "chord": None if kind == "rpc" else [1, 2, 3],
        "state": "FAILURE",
        "forgotten": "PENDING",
        "late": True,
    }
