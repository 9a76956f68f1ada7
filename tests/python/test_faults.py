"""Faults at every step of a transfer: the worker is killed or freezes at the step, or the step fails once or runs twice.

After every fault the transfer ends in one of two ways: one verified file and COMPLETED, or no file under the final
name and a row with the reason; with the right number of failures, never two copies at once, and no file left over.
The program lists its fault points (src/faults.rs); the test fails for a point without a scenario in this file.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import MB, Process, clean_environment, held, service, sha256, until
from variants import OnPostgres, OwnBbcp, RealBbcp

pytestmark = pytest.mark.timeout(280)

BROKERS = ["rabbitmq", "redis"]

SIZE = MB

# ---------------------------------------------------------------- expectations

# Scenario that reaches each point.
MANAGER = ["manager_row_locked", "manager_published", "manager_committed"]
SWEEP = ["sweep_written", "sweep_committed"]
BEFORE_COPY = ["task_accepted", "lease_taken", "plan_read", "claimed", "prepared", "leftovers_swept", "files_recorded"]
COPYING = ["copy_spawned", "first_progress", "copy_ended", "origin_digested", "destination_digested"]
COPIED = ["verified", "lease_confirmed"]
RENAMED = ["renamed", "settlement_written", "completed", "task_done", "result_stored", "acknowledged"]
RETRY = ["tidied", "failure_counted", "retry_written"]
PERMANENT = ["failure_written"]
RELEASE = ["released"]
RESUME = ["partial_begun"]
BUSY = ["postponed"]
EXISTING = ["marker_made"]
SCENARIOS = {
    "manager": MANAGER,
    "sweep": SWEEP,
    "good": BEFORE_COPY + COPYING + COPIED + RENAMED,
    "retry": RETRY,
    "permanent": PERMANENT,
    "release": RELEASE,
    "resume": RESUME,
    "busy": BUSY,
    "existing": EXISTING,
}

# Steps outside of the database: their failure is a failure of the transfer. It is counted, and another attempt follows.
COUNTED = ["prepared", "partial_begun", *COPYING, "verified", "renamed"]


def expected_retries(scenario, point, mode):
    retries = {"retry": 1}.get(scenario, 0)
    if scenario in ("good", "resume") and point in COUNTED and mode == "fail":
        retries += 1
    if (point, mode) == ("copy_ended", "twice"):
        # The second bbcp finds the file of the first one under the name of the attempt.
        retries += 1
    if scenario == "retry" and mode in ("kill", "pause") and point != "retry_written":
        # The failure was not recorded, so the attempt counts as interrupted.
        retries -= 1
    return retries


def expected_copies(scenario, point, mode):
    """Minimum and maximum number of copies."""
    if (point, mode) == ("copy_ended", "twice"):
        return 3, 3
    # A worker that continues just before the start of a copy may start it before its lease renewer notices that the
    # lease is lost, and stops the copy.
    wakes_up = point in ("files_recorded", "partial_begun") and mode == "pause"
    if scenario in ("retry", "release", "resume"):
        return 2, 2 + wakes_up
    if point == "copy_spawned" and mode in ("kill", "fail"):
        # A bbcp that is killed at once may not have written its record.
        return 1, 2
    if point in COPYING + COPIED and (mode in ("kill", "pause") or (mode == "fail" and point in COUNTED)):
        return 2, 2
    return 1, 1 + wakes_up


# ---------------------------------------------------------------- a case


class Case:
    """One fault at one point."""

    def __init__(self, scenario, point, mode):
        self.scenario, self.point, self.mode = scenario, point, mode
        self.workers = []
        self.outcome = self.problem = ""
        self.retries = self.attempts = self.copied = self.seconds = "-"

    def run(self, deployments):
        """Runs the case in an unused deployment. After a problem the deployment is not used again."""
        began = time.monotonic()
        try:
            self.deployment = deployments.take()
            self.play()
            self.judge()
            deployments.give_back(self.deployment)
        except Exception:
            self.problem = traceback.format_exc()
            for worker in self.workers:
                self.problem += f"\n{worker.log_path}\n{worker.log()[-3000:]}"
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
        # One message for each worker: a further message at a frozen worker would have to wait for it.
        name = f"w{len(self.workers)}"
        worker = self.deployment.worker(concurrency=1, ready=False, name=name, CCAT_TRANSFER_FAULT=fault)
        self.workers.append(worker)
        return worker

    def manager(self, fault=""):
        return self.program("manager", "--once", fault=fault)

    # --- the story

    def play(self):
        deployment, fault = self.deployment, f"{self.point}:{self.mode}"
        deployment.settings()
        deployment.double_log = deployment.directory / f"bbcp-{self.point}-{self.mode}.log"
        getattr(self, f"prepare_{self.scenario}")()
        self.transfer = deployment.package(size=SIZE)
        victim = getattr(self, f"play_{self.scenario}")(fault)
        until(lambda: '"fault injected"' in victim.log(), f"{fault} happens", 20 * deployment.patience)
        if self.mode == "kill":
            assert victim.ended() == -signal.SIGKILL, victim.log()
        if self.mode == "pause":
            until(lambda: state(victim.pid) == "T", "the process stands still")
            if self.scenario in ("manager", "sweep"):
                other = self.manager()
                time.sleep(0.3)  # as long as it is frozen
                victim.signal(signal.SIGCONT)
                assert other.ended() == 0, other.log()
            else:
                self.worker()
                self.until_over(victim)
                victim.signal(signal.SIGCONT)
        if victim not in self.workers and self.mode != "kill":
            assert victim.ended() in (0, 5), victim.log()
        deadline = time.monotonic() + 40 * deployment.patience
        while not self.over():
            assert time.monotonic() < deadline, self.deployment.row(self.transfer)
            if not any(worker.running() for worker in self.workers):
                self.worker()
            self.push()
        self.stop_workers()

    def until_over(self, frozen):
        """Another worker takes over the transfer of the frozen one when its lease has expired. Not if it is frozen in
        the middle of a transaction, whose lock blocks the others, or with a message and no lease."""
        if self.point in ("settlement_written", "task_accepted", "released"):
            return time.sleep(0.5)
        deadline = time.monotonic() + 20 * self.deployment.patience
        while not self.over():
            assert time.monotonic() < deadline, f"no worker took it over\n{frozen.log()[-2000:]}"
            # This also sweeps expired leases.
            assert self.manager().ended() == 0
            time.sleep(0.3)

    def over(self):
        return self.deployment.status(self.transfer) in ("COMPLETED", "FAILED")

    def push(self):
        """Runs the regular work of a manager."""
        if self.deployment.status(self.transfer) == "PENDING":
            assert self.manager().ended() == 0
        time.sleep(0.1)

    def stop_workers(self):
        """Lets the workers finish their messages, also those that are not needed any more. A message that a worker
        holds, and has not begun when it is stopped, goes back to the queue and to another worker."""
        broker, queue, patience = self.deployment.broker, self.deployment.queue, self.deployment.patience
        if not any(worker.running() for worker in self.workers):
            self.worker().says("worker ready")
        for _ in range(5):
            until(lambda: broker.is_drained(queue), "the queue is empty", 20 * patience)
            for worker in self.workers:
                if worker.running():
                    until(lambda: idle(worker), "the worker is idle", 20 * patience)
                    worker.signal(signal.SIGTERM)
            for worker in self.workers:
                worker.ended()
            if not broker.ready(queue):
                return
            self.worker().says('"task received"')
        raise AssertionError("a message is left in the queue")

    # No other fault.

    def prepare_good(self):
        # Slow enough to be observed during the copy.
        self.deployment.double(**({"RATE": SIZE // 2} if self.point == "first_progress" else {}))

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

    # A worker completes the partial copy of an earlier one.

    def prepare_resume(self):
        self.deployment.settings(transfer={"resume_above": 0})
        self.deployment.double(PLAN="slow:200000;ok")

    def play_resume(self, fault):
        first = self.play_good("")
        growing = self.deployment.destination
        until(lambda: any(path.is_file() and path.stat().st_size for path in growing.rglob("*")), "bytes are there")
        first.signal(signal.SIGQUIT)
        assert first.ended() == 0
        assert self.deployment.temporary_files(), "the partial copy is kept"
        return self.worker(fault)

    # Another transfer copies to the same path: this one has to wait, and then finds the file.

    def prepare_busy(self):
        self.deployment.settings(transfer={"retry_delay_first": "300ms"})
        self.deployment.double(RATE=SIZE // 2)

    def play_busy(self, fault):
        first = self.transfer
        self.play_good("")
        self.deployment.mid_copy(size=1)
        # Held for a long time, or else the path may be free before the second worker starts on a slow machine.
        with held(self.deployment.bbcp_processes()):
            self.transfer = self.deployment.transfer(self.deployment.row(first)["relative_path"])
            victim = self.worker(fault)
            assert self.manager().ended() == 0
            until(lambda: '"fault injected"' in victim.log(), f"{fault} happens")
        return victim

    # The file exists at the destination already.

    def prepare_existing(self):
        self.deployment.double()

    def play_existing(self, fault):
        path = self.deployment.row(self.transfer)["relative_path"]
        there = self.deployment.destination / path
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.deployment.origin / path, there)
        victim = self.play_good(fault)
        until(lambda: '"fault injected"' in victim.log(), f"{fault} happens", 20 * self.deployment.patience)
        assert self.recorded() == [path.name for path in self.deployment.temporary_files(self.transfer)] != []
        return victim

    def recorded(self):
        """Names of the temporary files on record."""
        sql = "SELECT temporary_name FROM transfer_worker_attempt WHERE data_transfer_id = ? AND temporary_name IS NOT NULL"
        return [row["temporary_name"] for row in self.deployment.rows(sql, self.transfer)]

    # The manager.

    def prepare_manager(self):
        self.deployment.double()

    def play_manager(self, fault):
        return self.manager(fault)

    # Another process sweeps the lease of a dead worker.

    def prepare_sweep(self):
        self.deployment.double()

    def play_sweep(self, fault):
        dead = self.play_good("lease_taken:kill")
        assert dead.ended() == -signal.SIGKILL
        return self.manager(fault)

    # --- the checks

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

        # At most one copy at any moment. A frozen worker cannot stop its bbcp: it has lost its lease and will
        # not publish, but its bbcp continues.
        if self.mode != "pause":
            assert [copy for copy in copies if copy["beside"]] == [], "two copies at once"
        if copies:
            least, most = expected_copies(self.scenario, self.point, self.mode)
            assert least <= len(copies) <= most, f"{len(copies)} copies, not {least} to {most}"

        # No temporary file is left.
        deployment.no_bbcp_left()
        if self.scenario == "existing":
            assert copies == [] and self.recorded() == []
        files = [path for path in deployment.destination.rglob("*") if path.is_file()]
        assert files == ([there] if row["status"] == "COMPLETED" else [])
        assert deployment.leases() == []
        assert None not in deployment.outcomes(self.transfer), "an attempt without an end"
        assert deployment.broker.ready(deployment.queue) == 0
        there.unlink(missing_ok=True)


def state(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


ENDS = ["task succeeded", "task failed", "task was interrupted", "task ignored", "task was revoked or has expired", "the new delivery joins it"]


def idle(worker):
    """Returns true if all messages that the worker received are settled."""
    log = worker.log()
    return not worker.running() or log.count('"task received"') <= sum(log.count(end) for end in ENDS)


# ---------------------------------------------------------------- all of them


def listed():
    """Points of the program under test, with the possible modes of each."""
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


class Deployments:
    """A pool of deployments, as many as are used at once."""

    def __init__(self, make, directory):
        self.make, self.directory = make, directory
        self.free, self.all, self.lock = [], [], threading.Lock()

    def take(self):
        with self.lock:
            if self.free:
                return self.free.pop()
            directory = self.directory / str(len(self.all))
            directory.mkdir()
            self.all.append(None)
        deployment = self.make(directory)
        with self.lock:
            self.all[int(directory.name)] = deployment
        return deployment

    def give_back(self, deployment):
        with self.lock:
            self.free.append(deployment)

    def close(self):
        for deployment in filter(None, self.all):
            deployment.close()


def run(make, directory, cases, at_once=4):
    """Runs `at_once` cases at a time. They mostly wait, but a higher number is hardly faster and keeps twenty processes
    runnable: the restart of a broker by a parallel test then takes a quarter of a minute instead of five
    seconds, and over a minute on a slow machine. For the same reason they have a lower priority. (On Linux a thread has
    its own niceness, and its child processes inherit it.)
    """
    deployments = Deployments(make, directory)
    # Cases that wait for the expiry of a lease begin first.
    cases = sorted(chosen(cases), key=lambda case: case[2] != "pause")
    try:
        with ThreadPoolExecutor(at_once, initializer=lambda: os.nice(10)) as pool:
            return list(pool.map(lambda case: Case(*case).run(deployments), cases))
    finally:
        deployments.close()


def report(tell, title, cases):
    order = {point: n for n, point in enumerate(sum(SCENARIOS.values(), []))}
    cases = sorted(cases, key=lambda case: (order[case.point], case.mode))
    tell(f"{title}: {len(cases)} faults")
    tell(f"{'step':<21}{'mode':<7}{'way':<10}{'outcome':<11}{'retries':<8}{'copies':<7}{'seconds':<8}attempts")
    for case in cases:
        tell(
            f"{case.point:<21}{case.mode:<7}{case.scenario:<10}{case.outcome or 'PROBLEM':<11}{case.retries:<8}"
            f"{case.copied:<7}{case.seconds:<8}{case.attempts}{'  <-- ' if case.problem else ''}"
        )
    problems = [f"{case.point}:{case.mode}\n{case.problem}" for case in cases if case.problem]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def all_cases():
    return [(scenario_of(point), point, mode) for point, modes in listed().items() for mode in modes]


@pytest.mark.parametrize("kind", [OwnBbcp, OnPostgres], ids=["sqlite", "postgresql"])
def test_every_step(kind, tmp_path, bbcp, broker, tell):
    if kind is OnPostgres and not broker.has_amqp and "EVERY_STEP" not in os.environ:
        pytest.skip("with Redis, SQLite is enough unless EVERY_STEP is set")
    done = run(lambda directory: kind(directory, bbcp, broker), tmp_path, all_cases())
    report(tell, f"{'SQLite' if kind is OwnBbcp else 'PostgreSQL'}, bbcp's double", done)


@pytest.mark.timeout(1500)
@pytest.mark.skipif("BBCP_REAL" not in os.environ, reason="BBCP_REAL does not name a real bbcp")
def test_every_step_with_the_real_bbcp(tmp_path, broker, tell):
    """The same over ssh. The failures of the real program cannot be controlled, so only our own faults are injected."""
    cases = [case for case in all_cases() if case[0] in ("manager", "sweep", "good")]
    done = run(lambda directory: RealBbcp(directory, broker), tmp_path, cases, at_once=4)
    report(tell, "SQLite, real bbcp over ssh", done)
