"""Everything goes wrong at once, and still every transfer ends in one of the two permitted ways."""

import collections
import random
import re
import signal
import time

from support import MB, Process, clean_environment, service, sha256

TRANSFERS = 50
WORKERS = 3
FAILURES = [
    "refused",
    "reset@30%",
    "segv-sink@50%",
    "segv-agent@30%",
    "enospc@40%",
    "corrupt:1000",
    "short:10",
    "stall@50%",
    "fork-stderr",
]


def test_soak(deployment):
    """Three workers are killed and stopped at random while a quarter of all copies fails; seeded."""
    chance = random.Random(7)
    deployment.settings(transfer={"stall_timeout": "4s", "max_retries": 8}, manager={"sleep_time": "500ms"})
    deployment.double(RATE=MB // 2, FAIL_RATE=0.25, SEED=11, FAIL_SET=";".join(FAILURES), ACCEPT=0.1)
    transfers = [deployment.package() for _ in range(TRANSFERS)]
    workers = [deployment.worker(concurrency=3, ready=False, name=f"w{i}") for i in range(WORKERS)]
    manager = [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "manager"]
    deployment.processes.append(
        Process(manager, deployment.directory / "manager.log", cwd=deployment.directory, env=clean_environment())
    )

    def ended():
        return all(deployment.status(transfer) in ("COMPLETED", "FAILED") for transfer in transfers)

    deadline, stopped = time.monotonic() + 120, 0
    while not ended():
        assert time.monotonic() < deadline, collections.Counter(map(deployment.status, transfers))
        time.sleep(1.5)  # the pace of the mischief
        if stopped < 20:
            victim = chance.randrange(WORKERS)
            how = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGQUIT, signal.SIGTERM])
            workers[victim].signal(how)
            workers[victim].process.wait(30)
            workers[victim] = deployment.worker(concurrency=3, ready=False, name=f"w{victim}")
            stopped += 1

    outcomes = collections.Counter(
        row["error_code"] or row["outcome"]
        for row in deployment.rows("SELECT outcome, error_code FROM transfer_worker_attempt")
    )
    print(f"{TRANSFERS} transfers, {stopped} workers killed or stopped, attempts: {dict(outcomes)}")
    assert outcomes["interrupted"] > 0 and len(outcomes) > 4, "the mischief did not happen"

    deployment.no_bbcp_left()
    assert deployment.temporary_files() == [] and deployment.leases() == []
    for transfer in transfers:
        row = deployment.row(transfer)
        there = deployment.destination / row["relative_path"]
        if row["status"] == "COMPLETED":
            assert sha256(there) == sha256(deployment.origin / row["relative_path"])
        else:
            assert not there.exists() and row["failure_error_message"]
    assert_one_at_a_time(deployment.copies())


def assert_one_at_a_time(copies):
    """No two copies of one transfer ran at once; those that were killed have no end on record."""
    by_transfer = collections.defaultdict(list)
    for copy in copies:
        transfer = re.search(r"\.ccat-transfer-(\d+)-", copy["argv"][-1])[1]
        by_transfer[transfer].append(copy)
    for runs in by_transfer.values():
        runs.sort(key=lambda run: run["start"])
        for earlier, later in zip(runs, runs[1:]):
            assert earlier["end"] is None or earlier["end"] <= later["start"], (earlier, later)
