"""Every step of a transfer: the worker is killed at it, the step fails once, is made twice, the worker freezes at it.

Whatever happens, the transfer ends in one of two ways: one verified file and COMPLETED, or no file under the final
name and a row that tells why; with the right count of failures, never two copies at once, and nothing left over.
The points are those that the program itself lists (src/faults.rs); one that this file has no scenario for fails.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import MB, Process, clean_environment, service, sha256, until
from variants import OnPostgres, OwnBbcp, RealBbcp

pytestmark = pytest.mark.timeout(280)

SIZE = MB
# So many cases at once. They wait more than they work.
AT_ONCE = 8

# ---------------------------------------------------------------- what is to be expected

# The way that leads to each point.
MANAGER = ["manager_row_locked", "manager_published", "manager_committed"]
SWEEP = ["sweep_written", "sweep_committed"]
BEFORE_COPY = ["task_accepted", "lease_taken", "plan_read", "prepared", "leftovers_swept", "files_recorded"]
COPYING = ["copy_spawned", "first_progress", "copy_ended", "origin_digested", "destination_digested"]
COPIED = ["verified", "lease_confirmed"]
RENAMED = ["renamed", "settlement_written", "completed", "task_done", "result_stored", "acknowledged"]
RETRY = ["tidied", "failure_counted", "retry_written"]
PERMANENT = ["failure_written"]
RELEASE = ["released"]
SCENARIOS = {
    "manager": MANAGER,
    "sweep": SWEEP,
    "good": BEFORE_COPY + COPYING + COPIED + RENAMED,
    "retry": RETRY,
    "permanent": PERMANENT,
    "release": RELEASE,
}

# Steps outside of the database whose failure is the transfer's: it is counted, and there is another attempt.
COUNTED = ["prepared", *COPYING, "verified", "renamed"]


def expected_retries(scenario, point, mode):
    retries = {"retry": 1}.get(scenario, 0)
    if scenario == "good" and point in COUNTED and mode == "fail":
        retries += 1
    if (point, mode) == ("copy_ended", "twice"):
        # The second bbcp finds the first one's file under the attempt's own name.
        retries += 1
    if scenario == "retry" and mode == "kill" and point != "retry_written":
        # What failed is not on record: an attempt that was interrupted.
        retries -= 1
    return retries


def expected_copies(scenario, point, mode):
    """So many copies at least and at the most. A bbcp that is killed at once may not have got to its record."""
    least = most = 1
    if scenario == "retry":
        least = most = 2
    if scenario == "release":
        least = most = 2
    if scenario == "sweep":
        least = most = 1
    if scenario == "permanent":
        # Failed for good, but what was killed before is made again.
        least = most = 1
    if scenario == "good" and point in COPYING + COPIED and mode != "twice":
        if mode in ("kill", "pause") or point in COUNTED:
            least = most = 2
        if point == "copy_spawned" and mode in ("kill", "fail"):
            least = 1
    if (point, mode) == ("copy_ended", "twice"):
        least = most = 3
    return least, most


# ---------------------------------------------------------------- a case


class Case:
    """One fault at one point."""

    def __init__(self, scenario, point, mode, make):
        self.scenario, self.point, self.mode = scenario, point, mode
        self.make = make
        self.began = time.monotonic()
        self.workers = []
        self.outcome = self.problem = ""
        self.retries = self.attempts = self.copied = self.seconds = "-"

    def run(self):
        began = time.monotonic()
        try:
            with self.make() as self.deployment:
                self.play()
                self.judge()
        except Exception:
            self.problem = traceback.format_exc()
        self.seconds = f"{time.monotonic() - began:.1f}"
        return self

    # --- programs

    def program(self, *arguments, fault=""):
        deployment = self.deployment
        process = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, *arguments],
            deployment.directory / f"program-{len(deployment.processes)}.log",
            cwd=deployment.directory,
            env=clean_environment(CCAT_TRANSFER_FAULT=fault),
        )
        deployment.processes.append(process)
        return process

    def worker(self, fault=""):
        worker = self.deployment.worker(ready=False, name=f"w{len(self.workers)}", CCAT_TRANSFER_FAULT=fault)
        self.workers.append(worker)
        return worker

    def manager(self, fault=""):
        return self.program("manager", "--once", fault=fault)

    # --- the story

    def play(self):
        deployment, fault = self.deployment, f"{self.point}:{self.mode}"
        getattr(self, f"prepare_{self.scenario}")()
        self.transfer = deployment.package(size=SIZE)
        victim = getattr(self, f"play_{self.scenario}")(fault)
        until(lambda: '"fault injected"' in victim.log(), f"{fault} happens")
        if self.mode == "kill":
            assert victim.ended() == -signal.SIGKILL, victim.log()
        if self.mode == "pause":
            until(lambda: state(victim.pid) == "T", "the process stands still")
            if self.scenario in ("manager", "sweep"):
                other = self.manager()
                time.sleep(0.3)  # as long as it stands still
                victim.signal(signal.SIGCONT)
                assert other.ended() == 0, other.log()
            else:
                self.worker()
                # Until somebody else has done it, or long enough for a lease to die: nobody else can while the
                # frozen one is in the middle of a transaction.
                deadline = time.monotonic() + 4.5
                while time.monotonic() < deadline and not self.over():
                    self.push()
                victim.signal(signal.SIGCONT)
        if victim not in self.workers and self.mode != "kill":
            assert victim.ended() in (0, 5), victim.log()
        if not any(worker.running() for worker in self.workers):
            self.worker()
        deadline = time.monotonic() + 40
        while not self.over():
            assert time.monotonic() < deadline, self.deployment.row(self.transfer)
            self.push()
        self.stop_workers()

    def over(self):
        return self.deployment.status(self.transfer) in ("COMPLETED", "FAILED")

    def push(self):
        """What a manager does once in a while."""
        if self.deployment.status(self.transfer) == "PENDING":
            assert self.manager().ended() == 0
        time.sleep(0.1)

    def stop_workers(self):
        """Lets them end what they have in their hands, also the messages that are of no more use."""
        deployment = self.deployment
        until(lambda: not deployment.broker.ready(deployment.queue), "the queue is empty")
        for worker in self.workers:
            if worker.running():
                until(lambda: idle(worker), "the worker is idle")
                worker.signal(signal.SIGTERM)
        for worker in self.workers:
            worker.ended()

    # Good: nothing else goes wrong.

    def prepare_good(self):
        self.deployment.double()

    def play_good(self, fault):
        victim = self.worker(fault)
        assert self.manager().ended() == 0
        return victim

    # The first copy fails, the second does not.

    def prepare_retry(self):
        self.deployment.double(PLAN="reset@30%;ok")

    play_retry = play_good

    # The copy fails for good.

    def prepare_permanent(self):
        self.deployment.double(PLAN="srcperm")

    play_permanent = play_good

    # A worker is stopped in the middle of a copy.

    def prepare_release(self):
        self.deployment.double(PLAN="slow:200000;ok")

    def play_release(self, fault):
        victim = self.play_good(fault)
        self.deployment.mid_copy(size=1)
        victim.signal(signal.SIGQUIT)
        return victim

    # The manager.

    def prepare_manager(self):
        self.deployment.double()

    def play_manager(self, fault):
        return self.manager(fault)

    # Somebody sweeps the lease of a dead worker.

    def prepare_sweep(self):
        self.deployment.double()

    def play_sweep(self, fault):
        dead = self.play_good("lease_taken:kill")
        assert dead.ended() == -signal.SIGKILL
        return self.manager(fault)

    # --- the judgement

    def judge(self):
        deployment = self.deployment
        row = deployment.row(self.transfer)
        there = deployment.destination / row["relative_path"]
        copies = deployment.copies()
        self.outcome = row["status"]
        self.retries, self.copied = row["retry_count"], len(copies)
        self.attempts = ",".join(outcome[:4] for outcome in deployment.outcomes(self.transfer))

        if row["status"] == "COMPLETED":
            assert self.scenario != "permanent"
            assert sha256(there) == sha256(deployment.origin / row["relative_path"])
            assert row["failure_error_message"] is None
        else:
            assert self.scenario == "permanent", row
            assert not there.exists() and "cannot be read" in row["failure_error_message"]
        assert row["retry_count"] == expected_retries(self.scenario, self.point, self.mode), "retry_count"

        # At most one copy at any moment. A frozen worker cannot stop its bbcp: it has lost its lease, and will
        # not publish, but what it has started goes on.
        if self.mode != "pause":
            assert [copy for copy in copies if copy["beside"]] == [], "two copies at once"
        if copies:
            least, most = expected_copies(self.scenario, self.point, self.mode)
            assert least <= len(copies) <= most, f"{len(copies)} copies, not {least} to {most}"

        # Nothing is left.
        deployment.no_bbcp_left()
        files = [path for path in deployment.destination.rglob("*") if path.is_file()]
        assert files == ([there] if row["status"] == "COMPLETED" else [])
        assert deployment.leases() == []
        assert None not in deployment.outcomes(self.transfer), "an attempt without an end"
        assert deployment.broker.ready(deployment.queue) == 0
        # The copy at the origin is as it was.
        assert there.name and (deployment.origin / row["relative_path"]).stat().st_size == SIZE


def state(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


ENDS = ["task succeeded", "task failed", "task was interrupted", "task ignored", "task does not run", "task runs here"]


def idle(worker):
    """Everything that it received has come to an end."""
    log = worker.log()
    return not worker.running() or log.count('"task received"') <= sum(log.count(end) for end in ENDS)


# ---------------------------------------------------------------- all of them


def listed():
    """What the program under test can do at each point."""
    done = subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "fault-points"], capture_output=True, text=True, env=clean_environment()
    )
    if done.returncode:
        pytest.fail("this ccat-transfer has no fault points: build it with --features fault-points, as scripts/test.sh does")
    return {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}


def scenario_of(point):
    found = [scenario for scenario, points in SCENARIOS.items() if point in points]
    assert len(found) == 1, f"{point}: every fault point needs one scenario, and has {found}"
    return found[0]


def chosen(cases):
    """Only some, by FAULTS=renamed:kill,…"""
    only = [word for word in os.environ.get("FAULTS", "").split(",") if word]
    return [case for case in cases if not only or f"{case[1]}:{case[2]}" in only or case[1] in only]


def run(make, cases):
    # What waits for a lease to die begins first.
    cases = sorted(chosen(cases), key=lambda case: case[2] != "pause")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda case: Case(*case, make).run(), cases))


def report(capsys, title, cases):
    order = {point: n for n, point in enumerate(sum(SCENARIOS.values(), []))}
    cases = sorted(cases, key=lambda case: (order[case.point], case.mode))
    with capsys.disabled():
        print(f"\n\n{title}: {len(cases)} faults")
        print(f"{'step':<21}{'mode':<7}{'way':<10}{'outcome':<11}{'retries':<8}{'copies':<7}{'seconds':<8}attempts")
        for case in cases:
            print(
                f"{case.point:<21}{case.mode:<7}{case.scenario:<10}{case.outcome or 'PROBLEM':<11}{case.retries:<8}"
                f"{case.copied:<7}{case.seconds:<8}{case.attempts}{'  <-- ' if case.problem else ''}"
            )
    problems = [f"{case.point}:{case.mode}\n{case.problem}" for case in cases if case.problem]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("database", [OwnBbcp, OnPostgres], ids=["sqlite", "postgresql"])
def test_every_step(database, tmp_path, bbcp, broker, capsys):
    count = iter(range(10_000))
    lock = threading.Lock()

    @contextlib.contextmanager
    def make():
        with lock:
            directory = tmp_path / str(next(count))
        directory.mkdir()
        deployment = database(directory, bbcp, broker)
        try:
            yield deployment
        finally:
            deployment.close()

    cases = [(scenario_of(point), point, mode) for point, modes in listed().items() for mode in modes]
    report(capsys, f"{database.__name__}, bbcp's double", run(make, cases))


@pytest.mark.skipif("BBCP_REAL" not in os.environ, reason="BBCP_REAL does not name a real bbcp")
def test_every_step_with_the_real_bbcp(tmp_path, broker, capsys):
    """The same over ssh, where nothing but our own faults can be had: the real program fails when it likes."""
    count = iter(range(10_000))

    @contextlib.contextmanager
    def make():
        directory = tmp_path / str(next(count))
        directory.mkdir()
        deployment = RealBbcp(directory, broker)
        try:
            yield deployment
        finally:
            deployment.close()

    ways = ("manager", "sweep", "good")
    cases = [(scenario_of(point), point, mode) for point, modes in listed().items() for mode in modes]
    report(capsys, "SQLite, real bbcp over ssh", run(make, [case for case in cases if case[0] in ways]))
