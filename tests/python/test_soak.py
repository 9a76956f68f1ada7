"""Many faults at the same time: every transfer still ends in one of the two permitted ways.

Four workers on PostgreSQL, one manager. Each worker runs until a random fault kills it, freezes it, or makes a step
fail or run twice, or until it is killed, frozen or stopped from outside. The workers' connections to the broker are
closed repeatedly, and a quarter of all copies fails in one of ten ways. All random choices come from one seed, which is
printed. SOAK_TRANSFERS=500 makes the test longer, SOAK_SEED sets the seed.
"""

import collections
import os
import random
import re
import signal
import subprocess
import threading
import time

import pytest

from support import MB, Process, clean_environment, service, sha256, until
from test_faults import idle, state
from variants import OnPostgres

BROKERS = ["rabbitmq", "redis"]

TRANSFERS = int(os.environ.get("SOAK_TRANSFERS", "120"))
SEED = int(os.environ.get("SOAK_SEED", "7"))
WORKERS = 4
CONCURRENCY = 3
SIZE = MB // 2

pytestmark = pytest.mark.timeout(120 + 2 * TRANSFERS)

FAILURES = [
    "refused",
    "reset@30%",
    "segv-sink@50%",
    "segv-agent@30%",
    "enospc@40%",
    "corrupt:1000",
    "short:10",
    "long:10",
    "stall@50%",
    "fork-stderr",
]


class Mischief:
    """Random faults of the processes, from one seed."""

    def __init__(self, deployment, broker):
        self.deployment, self.broker = deployment, broker
        self.chance = random.Random(SEED)
        listed = subprocess.run(
            [service("CCAT_TRANSFER_BIN"), "fault-points"],
            capture_output=True,
            text=True,
            env=clean_environment(),
            check=True,
        ).stdout
        self.points = [(words[0], mode) for words in map(str.split, listed.splitlines()) for mode in words[1:]]
        self.done = collections.Counter()
        self.lives = []
        self.workers = [self.born(n) for n in range(WORKERS)]
        self.manager = self.managing()

    def fault(self):
        point, mode = self.chance.choice(self.points)
        return f"{point}:{mode}:{self.chance.randint(1, 6)}"

    def born(self, n):
        fault = self.fault()
        worker = self.deployment.worker(concurrency=CONCURRENCY, ready=False, name=f"w{n}", CCAT_TRANSFER_FAULT=fault)
        self.lives.append(worker)
        return worker

    def managing(self):
        log = self.deployment.directory / f"manager-{len(self.deployment.processes)}.log"
        manager = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", self.deployment.config, "manager"],
            log,
            cwd=self.deployment.directory,
            env=clean_environment(CCAT_TRANSFER_FAULT=self.fault()),
        )
        self.deployment.processes.append(manager)
        self.lives.append(manager)
        return manager

    def round(self):
        """Causes one fault, and replaces dead processes."""
        kind = self.chance.choices(["kill", "QUIT", "TERM", "connections", "manager"], [6, 2, 2, 1, 1])[0]
        victim = self.chance.randrange(WORKERS)
        signals = {"kill": signal.SIGKILL, "QUIT": signal.SIGQUIT, "TERM": signal.SIGTERM}
        self.done[kind] += 1
        if kind in signals:
            self.workers[victim].signal(signals[kind])
        elif kind == "manager":
            self.manager.kill()
        else:
            self.broker.close_connections()
        self.mend()

    def mend(self):
        """Restarts dead processes, and continues frozen ones before their lease expires: a worker that is frozen for
        longer cannot stop its bbcp, and there would be two copies at once. test_faults.py tests that case."""
        for n, worker in enumerate(self.workers):
            if not worker.running():
                self.workers[n] = self.born(n)
        if not self.manager.running():
            self.manager = self.managing()
        for process in [*self.workers, self.manager]:
            if state(process.pid) == "T":
                process.signal(signal.SIGCONT)

    def faults(self):
        """Number of injected faults of each mode."""
        counted = collections.Counter()
        for process in self.lives:
            counted.update(re.findall(r'"fault injected","point":"\w+","mode":"(\w+)"', process.log()))
        return counted


def test_soak(tmp_path, bbcp, broker, capsys):
    deployment = OnPostgres(tmp_path, bbcp, broker)
    try:
        soak(deployment, broker, capsys)
    finally:
        deployment.close()


def soak(deployment, broker, capsys):
    began = time.monotonic()
    deployment.settings(
        transfer={"stall_timeout": "4s", "max_retries": 8, "digest": "blake3"}, manager={"sleep_time": "300ms"}
    )
    deployment.double(RATE=MB, FAIL_RATE=0.25, SEED=SEED, FAIL_SET=";".join(FAILURES), ACCEPT=0.1)
    transfers = packages(deployment, TRANSFERS)
    mischief = Mischief(deployment, broker)

    deadline = time.monotonic() + 60 + 1.5 * TRANSFERS
    rounds = TRANSFERS // 6
    while not all(status in ("COMPLETED", "FAILED") for status in statuses(deployment)):
        assert time.monotonic() < deadline, collections.Counter(statuses(deployment))
        time.sleep(0.7)  # interval between faults
        if rounds:
            rounds -= 1
            mischief.round()
        else:
            mischief.mend()
    seconds = time.monotonic() - began

    # All processes end without faults, so any remaining file is an error.
    for process in [*mischief.workers, mischief.manager]:
        if process.running():
            process.signal(signal.SIGCONT)
    until(lambda: not broker.ready(deployment.queue), "the queue is empty", 30)
    for process in [*mischief.workers, mischief.manager]:
        if process.running():
            process.signal(signal.SIGTERM)
    for process in [*mischief.workers, mischief.manager]:
        process.ended(60)
    if not broker.is_drained(deployment.queue):
        # A stopped worker held this message and had not begun it, or a killed worker held it.
        last = deployment.worker(name="last").says('"task received"')
        until(lambda: idle(last) and broker.is_drained(deployment.queue), "the last message is settled")
        last.signal(signal.SIGTERM)
        last.ended()

    violations = judge(deployment, transfers, broker)
    attempts = collections.Counter(
        row["error_code"] or row["outcome"]
        for row in deployment.rows("SELECT outcome, error_code FROM transfer_worker_attempt")
    )
    ends = collections.Counter(statuses(deployment))
    with capsys.disabled():
        print(f"\n\nsoak: seed {SEED}, {TRANSFERS} transfers, {WORKERS} workers, {seconds:.0f} s")
        for title, counted in [
            ("ended", ends),
            ("attempts ended", attempts),
            ("from outside", mischief.done),
            ("from inside", mischief.faults()),
        ]:
            print(f"  {title:<16}{', '.join(f'{n} {what}' for what, n in counted.most_common())}")
        print(f"  {'process lives':<16}{len(mischief.lives)}, bbcp runs {len(deployment.copies())}")
        print(f"  {'violations':<16}{len(violations)}")
    assert not violations, "\n".join(violations)
    assert attempts["interrupted"] and len(attempts) > 6 and mischief.faults(), "the mischief did not happen"


def packages(deployment, count):
    """Creates transfers as copies of one that the program created, because one process for each would take long."""
    first = deployment.package(size=SIZE)
    row = deployment.row(first)
    chance, made = random.Random(SEED), [first]
    for n in range(1, count):
        name = f"packages/soak-{n}.tar"
        (deployment.origin / name).write_bytes(chance.randbytes(SIZE))
        made.append(copied(deployment, row, name))
    return made


def copied(deployment, row, name):
    """Another package and transfer with the same values except the name."""

    def again(table, number, **other):
        (old,) = deployment.rows(f"SELECT * FROM {table} WHERE id = ?", number)
        new = {k: v for k, v in (old | other).items() if k != "id"}
        columns, marks = ", ".join(new), ", ".join("?" for _ in new)
        (made,) = deployment.rows(f"INSERT INTO {table} ({columns}) VALUES ({marks}) RETURNING id", *new.values())
        return made["id"]

    package = again(
        "data_transfer_package", row["data_transfer_package_id"], relative_path=name, file_name=name.rpartition("/")[2]
    )
    return again("data_transfer", row["id"], data_transfer_package_id=package)


def statuses(deployment):
    return [row["status"] for row in deployment.rows("SELECT CAST(status AS text) AS status FROM data_transfer")]


def judge(deployment, transfers, broker):
    """Lists all violations of the expected final state."""
    violations = []

    def expect(holds, what):
        if not holds:
            violations.append(what)

    deployment.no_bbcp_left()
    expect(not deployment.temporary_files(), f"temporary files: {deployment.temporary_files()}")
    expect(not deployment.leases(), f"leases: {deployment.leases()}")
    expect(not broker.ready(deployment.queue), "messages in the queue")
    expect(not broker.ready(f"{deployment.queue}.dead"), "rejected messages")
    files = {path for path in deployment.destination.rglob("*") if path.is_file()}
    for transfer in transfers:
        row = deployment.row(transfer)
        there, outcomes = deployment.destination / row["relative_path"], deployment.outcomes(transfer)
        if row["status"] == "COMPLETED":
            expect(there in files, f"{transfer} is COMPLETED and there is no file")
            if there in files:
                expect(sha256(there) == sha256(deployment.origin / row["relative_path"]), f"{transfer}: other bytes")
            expect(outcomes.count("completed") == 1, f"{transfer}: {outcomes}")
        else:
            expect(there not in files, f"{transfer} is {row['status']} and there is a file")
            expect(row["failure_error_message"], f"{transfer} is {row['status']} without a reason")
        files.discard(there)
        expect(None not in outcomes, f"{transfer}: an attempt without an end")
        expect(row["retry_count"] == outcomes.count("retried"), f"{transfer}: retry_count {row['retry_count']}, {outcomes}")
    expect(not files, f"unexpected files: {files}")
    violations += two_at_once(deployment.copies())
    return violations


def two_at_once(copies):
    """Copies of one transfer that ran at once."""
    of = {copy["pid"]: transfer_of(copy) for copy in copies}
    return [
        f"two copies of transfer {transfer_of(copy)} at once: {copy['argv'][-1]} beside {pid}"
        for copy in copies
        for pid in copy["beside"]
        if of.get(pid) == transfer_of(copy)
    ]


def transfer_of(copy):
    return re.search(r"\.ccat-transfer-(\d+)-", copy["argv"][-1])[1]
