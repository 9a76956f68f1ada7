"""Every known failure of bbcp, through a real worker: the typed error, or the good file. bbcp.md has the findings.

NOISE_SECONDS=30 is the required duration of the noise; the default is shorter.
"""

import os
import re
import time
from pathlib import Path

import pytest

from support import MB, sha256, until
from test_places import reach_by_ssh
from variants import ssh_settings

NOISE_SECONDS = float(os.environ.get("NOISE_SECONDS", "3"))
# Maximum additional memory for a copy whose bbcp prints noise.
MEMORY_KIB = 12 * 1024

pytestmark = pytest.mark.timeout(120 + 4 * NOISE_SECONDS)

BROKERS = ["rabbitmq", "redis"]

# Failure of the double: the recorded error of the attempt, or None if the file is good.
LOCAL = {
    "corrupt:1000": "checksum_mismatch",
    "short:10": "target_size",
    "long:10": "target_size",
    "skip": "target_size",
    "badsum": "damaged_in_flight",
    "fork-stderr": None,
    "stall@50%": "stalled",
    "segv-agent@30%": "segfault",
    "segv-sink@50%": "segfault",
    "enospc@40%": "storage_full",
    "enospc@10%": "storage_full",
}
REMOTE = {"segv-remote@30%": "remote_died", "segv-sink@50%": "segfault", "corrupt:1000": "checksum_mismatch"}


def attempt(deployment, transfer):
    (row,) = deployment.rows("SELECT * FROM transfer_worker_attempt WHERE data_transfer_id = ?", transfer)
    return row


def play(deployment, injections, **settings):
    """Runs one transfer for each failure, one after the other, by one worker; each has one attempt."""
    deployment.settings(transfer={"stall_timeout": "4s"}, **settings)
    transfers = {plan: deployment.package() for plan in injections}
    deployment.double(PLAN=";".join(injections), ANYHOST=1)
    deployment.worker(concurrency=1)
    deployment.schedule()
    until(
        lambda: len([row for row in deployment.rows("SELECT outcome FROM transfer_worker_attempt") if row["outcome"]])
        == len(injections),
        "each had its attempt",
        60,
    )
    assert [copy["plan"] for copy in deployment.copies()] == list(injections), "in their order"
    for plan, code in injections.items():
        transfer = transfers[plan]
        row, done = deployment.row(transfer), attempt(deployment, transfer)
        assert done["error_code"] == code, (plan, done)
        there = deployment.destination / row["relative_path"]
        if code is None:
            assert row["status"] == "COMPLETED" and row["retry_count"] == 0
            assert sha256(there) == sha256(deployment.origin / row["relative_path"])
        else:
            assert (row["status"], row["retry_count"]) == ("PENDING", 1), plan
            assert not there.exists(), f"{plan} left a file under the final name"
            assert row["failure_error_message"] == done["message"]
    deployment.no_bbcp_left()
    assert deployment.temporary_files() == [] and deployment.leases() == []


def test_injections_at_this_host(deployment):
    play(deployment, LOCAL)


def test_injections_at_another_host(deployment):
    reach_by_ssh(deployment, deployment.destination_site)
    play(deployment, REMOTE, ssh=ssh_settings())


def test_an_orphan_that_unlinks_by_name(deployment):
    """bbcp's agent dies, and its sink lives for seconds more and then unlinks its target by name (finding 5): the
    next attempt's file must not be the one it hits."""
    deployment.double(PLAN="orphan:8:unlink+kill@50%;ok", POLL=0.2)
    transfer = deployment.package()
    deployment.worker()
    deployment.schedule()
    until(lambda: deployment.row(transfer)["retry_count"] == 1, "the first attempt has failed")
    deployment.schedule()
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)
    deployment.no_bbcp_left(15)
    deployment.assert_moved(transfer)
    first, second = deployment.copies()
    assert first["argv"][-1] != second["argv"][-1]


def peak_kib(worker):
    """Peak memory of the process."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{worker.pid}/status").read_text())[1])


def test_noise_and_an_endless_line_leave_memory_flat(deployment):
    deployment.settings(transfer={"stall_timeout": f"{int(NOISE_SECONDS) * 3 + 30}s"})
    worker = deployment.worker(concurrency=1)
    grown = {}

    def copy(plan):
        deployment.double(PLAN=plan)
        transfer, before, began = deployment.package(), peak_kib(worker), time.monotonic()
        deployment.schedule()
        deployment.reaches(transfer, "COMPLETED", 60 + 3 * NOISE_SECONDS)
        grown[plan] = peak_kib(worker) - before
        return time.monotonic() - began

    copy("ok")
    lines = 100_000
    lines_per_s = lines / copy(f"noise:{lines}")
    noise = f"noise:{max(lines, int(NOISE_SECONDS * lines_per_s))}"
    seconds = copy(noise)
    copy("longline:100000000")
    print(f"{noise} took {seconds:.1f} s; peak memory {peak_kib(worker)} KiB, grown by {grown}")
    assert seconds >= NOISE_SECONDS / 2
    for plan, kib in grown.items():
        assert plan == "ok" or kib < MEMORY_KIB, f"{plan}: {kib} KiB"
