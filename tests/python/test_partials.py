"""Partial copies of ended transfers: removed by the program that ends the transfer, or reported."""

import contextlib
import json
import re
import sqlite3

import pytest

from support import MB


def execute(deployment, sql, *values):
    with contextlib.closing(sqlite3.connect(deployment.database, timeout=20)) as connection, connection:
        connection.execute(sql, values)


@pytest.fixture
def waiting(deployment):
    """A transfer that waits for its next attempt and has half of its copy at the destination."""
    deployment.settings(transfer={"resume_above": 0, "retry_delay_first": "1h"})
    deployment.double(PLAN="reset@50%")
    transfer = deployment.package("2026/a.tar", 4 * MB)
    assert deployment.cli("transfers", "run", transfer, check=False).returncode == 1
    assert deployment.row(transfer)["status"] == "PENDING"
    assert deployment.temporary_files(transfer)
    return transfer


def partials(deployment):
    """Doctor's finding."""
    done = deployment.cli("doctor", "--json", check=False)
    [finding] = [finding for finding in json.loads(done.stdout)["checks"] if finding["check"] == "partials"]
    return finding


@pytest.mark.parametrize("action", ["cancel", "fail"])
def test_giving_up_removes_the_copy(deployment, waiting, action):
    assert "partial copy .ccat-transfer-" in deployment.cli("transfers", "show", waiting)
    assert partials(deployment)["verdict"] == "green", "it is completed by the next attempt"
    dry = deployment.cli("transfers", action, waiting, "--reason", "test", "--dry-run")
    assert "partial copy" not in dry and deployment.temporary_files(waiting)
    output = deployment.cli("transfers", action, waiting, "--reason", "test")
    assert "its partial copy (2 MiB) is removed" in output
    assert deployment.temporary_files(waiting) == []
    assert "partial copy" not in deployment.cli("transfers", "show", waiting)
    assert partials(deployment)["verdict"] == "green"


def test_a_copy_that_cannot_be_removed_is_reported(deployment, waiting):
    sql = "UPDATE disk_data_location SET host = ? WHERE path = ?"
    execute(deployment, sql, "no-such-host.invalid", str(deployment.destination))
    output = deployment.cli("transfers", "cancel", waiting)
    assert "its partial copy was not removed" in output and f"transfers clean {waiting}" in output
    assert deployment.row(waiting)["status"] == "FAILED"
    finding = partials(deployment)
    assert finding["verdict"] == "yellow" and "transfers clean" in finding["advice"]
    assert re.fullmatch(r"1 partial copies of ended transfers are recorded, with \d+ bytes", finding["found"])
    done = deployment.cli("transfers", "clean", check=False)
    assert done.returncode == 1 and "not removed: no-such-host.invalid" in done.stdout

    execute(deployment, sql, None, str(deployment.destination))
    assert "is recorded" in deployment.cli("transfers", "clean", "--dry-run")
    assert deployment.temporary_files(waiting)
    [cleaned] = json.loads(deployment.cli("--json", "transfers", "clean"))
    assert cleaned["id"] == waiting and [partial["bytes"] for partial in cleaned["removed"]] == [2 * MB]
    assert deployment.temporary_files(waiting) == []
    assert json.loads(deployment.cli("--json", "transfers", "clean")) == []
    assert partials(deployment)["verdict"] == "green"


def test_only_our_own_names_are_removed(deployment, waiting):
    """Rows that were changed in the database directly, some of them with hostile names."""
    assert deployment.cli("transfers", "clean") == "", "it has not ended"
    victim = deployment.destination / "2026" / "b.tar"
    others = deployment.destination / "2026" / ".ccat-transfer-4711-1-00000000.part"
    for path in (victim, others):
        path.write_bytes(b"precious")
    [kept] = deployment.temporary_files(waiting)[:1]
    add = (
        "INSERT INTO transfer_worker_attempt (data_transfer_id, attempt, task_id, worker, started_at, outcome,"
        " temporary_name) SELECT data_transfer_id, ?, task_id, worker, started_at, outcome, ?"
        " FROM transfer_worker_attempt WHERE data_transfer_id = ? AND attempt = 1"
    )
    for number, name in enumerate(["b.tar", "../2026/b.tar", others.name], 2):
        execute(deployment, add, number, name, waiting)
    execute(deployment, "UPDATE data_transfer SET status = 'FAILED' WHERE id = ?", waiting)
    deployment.cli("transfers", "clean", waiting)
    assert victim.read_bytes() == others.read_bytes() == b"precious"
    others.unlink()
    assert deployment.temporary_files(waiting) == [], kept
