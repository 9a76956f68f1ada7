"""Commands of an operator: find, understand, change; on rows that real workers use."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

import big_lists
from support import MB, clean_environment, service, until
from variants import OnPostgres, OwnBbcp

# Time limit in seconds of one list, for the whole process. A debug build on a busy machine is slow;
# the guaranteed limit is LISTS_WITHIN=0.3 with a release build as CCAT_TRANSFER_BIN.
LISTS_WITHIN = float(os.environ.get("LISTS_WITHIN", "5"))


def code(deployment, *args):
    return deployment.cli("transfers", *args, check=False).returncode


def refused(deployment, *args):
    done = deployment.cli("transfers", *args, check=False)
    assert done.returncode == 6, done
    return done.stdout + done.stderr


def answer(deployment, *args):
    return json.loads(deployment.cli("--json", "transfers", *args))


class Terminal:
    """The program on its own pseudo-terminal."""

    def __init__(self, deployment, *args):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.text = ""
        self.process = subprocess.Popen(
            [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "transfers", *map(str, args)],
            cwd=deployment.directory,
            env=clean_environment(TERM="xterm"),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # As controlling terminal, so that Ctrl-C sends SIGINT.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def shows(self, text):
        def seen():
            while select.select([self.master], [], [], 0)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
            return text in self.text

        until(seen, f"{text!r} on the terminal: {self.text[-2000:]}", 30)

    def types(self, text):
        os.write(self.master, text.encode())

    def ended(self):
        code = self.process.wait(30)
        os.close(self.master)
        return code


def test_a_copy_is_cancelled_and_sent_again(deployment):
    """The worker stops the copy, removes it, and does not overwrite the operator's change."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=64 * MB)
    other = deployment.package()
    worker = deployment.worker()
    deployment.schedule()
    deployment.mid_copy()
    deployment.reaches(other, "COMPLETED")

    terminal = Terminal(deployment, "watch", "--interval", "200ms")
    terminal.shows("copying")
    terminal.shows("1 running")
    until(lambda: answer(deployment, "show", transfer)["lease"]["bytes_done"], "the lease has the progress")
    shown = deployment.cli("transfers", "show", transfer)
    for text in ["IN_PROGRESS", "2 streams", f"transfers cancel {transfer}", f"transfers watch {transfer}"]:
        assert text in shown, shown
    assert f"rust-{deployment.origin_site}" in refused(deployment, "retry", transfer)
    refused(deployment, "fail", transfer, "--reason", "no")
    assert "COMPLETED" in refused(deployment, "cancel", other)

    began = time.monotonic()
    said = deployment.cli("transfers", "cancel", transfer, "--reason", "the wrong night")
    assert "IN_PROGRESS → FAILED" in said
    deployment.no_bbcp_left()
    # One renewal (0.5 s here), and the time to end three processes on a busy machine.
    assert time.monotonic() - began < 10
    until(lambda: not deployment.temporary_files(transfer), "the temporary file is removed")
    worker.says("transfer did not complete")
    row = deployment.row(transfer)
    assert row["status"] == "FAILED"
    assert re.fullmatch(r"cancelled by \S+@\S+: the wrong night", row["failure_error_message"]), row
    assert deployment.outcomes(transfer) == ["interrupted"] and deployment.leases() == []
    # A running `watch` shows the change, and continues.
    terminal.shows("FAILED")
    terminal.types("\x03")
    assert terminal.ended() == 130

    shown = deployment.cli("transfers", "show", transfer)
    for text in ["cancelled by", f"`ccat-transfer transfers retry {transfer}`", "operators", "was IN_PROGRESS, cancel by"]:
        assert text in shown, shown
    assert code(deployment, "watch", transfer, "--until-done") == 1
    deployment.double()
    assert "FAILED → PENDING" in deployment.cli("transfers", "retry", transfer)
    watch = subprocess.Popen(
        [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "--json", "transfers", "watch", str(transfer)]
        + ["--until-done", "--interval", "100ms"],
        cwd=deployment.directory,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    deployment.schedule()
    seen = [json.loads(line) for line in watch.communicate(timeout=60)[0].splitlines()]
    assert watch.returncode == 0
    assert [line["id"] for line in seen] == [transfer] * len(seen)
    assert seen[-1]["status"] == "COMPLETED"
    deployment.assert_moved(transfer)
    actions = answer(deployment, "show", transfer)["actions"]
    assert [action["action"] for action in actions] == ["cancel", "retry"]


def test_a_change_of_many_transfers_needs_confirmation(shared_deployment):
    deployment = shared_deployment
    transfers = [deployment.transfer_of_nothing() for _ in range(3)]
    choice = ("--status", "pending", "--from", deployment.origin_site)
    before = deployment.rows("SELECT * FROM data_transfer")
    assert "--yes" in refused(deployment, "cancel", *choice)
    would = answer(deployment, "cancel", *choice, "--dry-run")
    assert {answer["id"] for answer in would} >= set(transfers)
    assert {answer["outcome"] for answer in would} == {"would_be_done"}
    terminal = Terminal(deployment, "cancel", *choice)
    terminal.shows("transfer(s)? [y/N]")
    terminal.types("n\n")
    assert terminal.ended() == 6
    assert deployment.rows("SELECT * FROM data_transfer") == before

    terminal = Terminal(deployment, "fail", *choice, "--limit", "1", "--reason", "a test")
    terminal.shows("fail 1 transfer(s)? [y/N]")
    terminal.types("y\n")
    terminal.shows("PENDING → FAILED")
    assert terminal.ended() == 0
    assert [deployment.status(id) for id in transfers] == ["FAILED", "PENDING", "PENDING"]
    done = answer(deployment, "cancel", *choice, "--yes")
    assert [answer["id"] for answer in done] == transfers[1:]
    assert answer(deployment, "retry", "--status", "failed", "--yes")[0]["to"] == "PENDING"

    # Transfers given by id need no confirmation; each has its line, and the exit code is the worst one.
    assert code(deployment, "cancel", transfers[0]) == 0
    mixed = deployment.cli("--json", "transfers", "cancel", *transfers[:2], check=False)
    assert mixed.returncode == 6
    assert [answer["outcome"] for answer in json.loads(mixed.stdout)] == ["refused", "done"]
    assert code(deployment, "retry", transfers[0], 4711) == 3
    assert deployment.status(transfers[0]) == "PENDING"
    for usage in [(), (transfers[0], "--status", "failed"), (transfers[0], "--limit", "1"), (1, "--reason", "a\nb")]:
        assert code(deployment, "retry", *usage) == 2, usage
    assert code(deployment, "fail", transfers[0]) == 2
    assert code(deployment, "show", 4711) == 3 and code(deployment, "log", 4711) == 3
    assert code(deployment, "list", "--site", "nowhere") == 3
    assert code(deployment, "watch", 4711) == 3


def test_the_next_step_is_explained(shared_deployment):
    deployment = shared_deployment
    transfer = deployment.transfer_of_nothing()
    outlook = answer(deployment, "show", transfer)["outlook"]
    assert "due" in outlook["why"] and "manager --once" in outlook["next"][0]
    deployment.execute("UPDATE data_transfer SET status = 'SCHEDULED' WHERE id = ?", transfer)
    outlook = answer(deployment, "show", transfer)["outlook"]
    assert deployment.queue in outlook["why"] and f"transfers retry {transfer}" in outlook["next"][1]
    deployment.execute("UPDATE data_transfer SET status = 'IN_PROGRESS' WHERE id = ?", transfer)
    outlook = answer(deployment, "show", transfer)["outlook"]
    assert "no lease" in outlook["why"] and "--untracked" in outlook["next"][1]
    assert "Python worker" in refused(deployment, "retry", transfer)
    assert code(deployment, "retry", transfer, "--untracked") == 0
    # One fails finally because its package is missing, another one waits after a temporary failure.
    assert code(deployment, "run", transfer) == 1
    outlook = answer(deployment, "show", transfer)["outlook"]
    assert outlook["why"].startswith("given up") and outlook["next"][0].startswith("Put it back")
    package = deployment.package(size=4)
    deployment.settings(transfer={"retry_delay_first": "1h"}, bbcp={"program": "/bin/false"})
    try:
        assert code(deployment, "run", package) == 1
        outlook = answer(deployment, "show", package)["outlook"]
        assert re.match(r"waits until .* in \d+m.*, after [a-z_]+", outlook["why"]), outlook
        assert deployment.cli("transfers", "list", "--waiting").count("not before") == 1
        assert "unchanged" not in deployment.cli("transfers", "retry", package)
        assert "unchanged" in deployment.cli("transfers", "retry", package)
    finally:
        deployment.settings()


def test_the_log_of_an_attempt(shared_deployment):
    deployment = shared_deployment
    deployment.double(RATE=4 * MB)
    transfer = deployment.package(size=8 * MB)
    assert "not been tried" in deployment.cli("transfers", "log", transfer, check=False).stderr
    run = subprocess.Popen(
        [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "transfers", "run", str(transfer)],
        cwd=deployment.directory,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = "SELECT log_path FROM transfer_worker_attempt WHERE data_transfer_id = ? AND log_path IS NOT NULL"
    path = Path(until(lambda: deployment.rows(log, transfer), "bbcp is started")[0]["log_path"])
    until(path.exists, "the log is there")
    followed = deployment.cli("transfers", "log", transfer, "--follow")
    assert run.wait(60) == 0
    deployment.double()
    whole = deployment.cli("transfers", "log", transfer)
    assert followed == whole == path.read_text()
    assert "bbcp" in whole
    lines = [json.loads(line)["line"] for line in deployment.cli("--json", "transfers", "log", transfer).splitlines()]
    assert lines == whole.splitlines()
    assert deployment.cli("transfers", "log", transfer, "--attempt", 1) == whole
    assert "attempts are 1 to 1" in deployment.cli("transfers", "log", transfer, "--attempt", 2, check=False).stderr

    path.unlink()
    gone = deployment.cli("transfers", "log", transfer, check=False)
    assert gone.returncode == 3 and "removed" in gone.stderr
    deployment.execute("UPDATE transfer_worker_attempt SET worker = 'celery@far.away' WHERE data_transfer_id = ?", transfer)
    gone = deployment.cli("transfers", "log", transfer, check=False)
    assert gone.returncode == 3 and "celery@far.away" in gone.stderr and str(path) in gone.stderr
    missing = deployment.transfer_of_nothing()
    assert code(deployment, "run", missing) == 1
    assert "bbcp was not started" in deployment.cli("transfers", "log", missing, check=False).stderr


def test_a_report_of_a_day(deployment):
    deployment.double()
    for _ in range(2):
        deployment.cli("transfers", "run", deployment.package())
    assert code(deployment, "run", deployment.transfer_of_nothing()) == 1
    link = (deployment.origin_site, deployment.destination_site)
    text = deployment.cli("transfers", "report")
    assert f"{link[0]} → {link[1]}  origin_missing × 1\n    Put it back" in text
    assert "####################" in text

    report = answer(deployment, "report", "--since", "2h", "--link", *link)
    [found] = report["links"]
    assert (found["origin"], found["destination"]) == link
    assert found["total"] == report["total"]
    counts = {key: report["total"][key] for key in ("packages", "bytes", "retried", "failed", "interrupted", "failures")}
    assert counts == {"packages": 2, "bytes": 2 * MB, "retried": 0, "failed": 1, "interrupted": 0, "failures": {"origin_missing": 1}}
    assert report["total"]["median_rate"] <= report["total"]["p95_rate"]

    lines = list(csv.DictReader(io.StringIO(deployment.cli("transfers", "report", "--csv"))))
    # More than one if midnight has passed.
    assert sum(int(line["packages"]) for line in lines) == 2
    assert {(line["origin"], line["destination"]) for line in lines} == {link}

    assert answer(deployment, "report", "--link", *reversed(link))["links"] == []
    unknown = deployment.cli("transfers", "report", "--link", link[0], "nowhere", check=False)
    assert unknown.returncode == 3 and "nowhere" in unknown.stderr
    deployment.execute("UPDATE transfer_worker_attempt SET ended_at = '2020-01-01T00:00:00+00:00'")
    assert "no attempt has ended" in deployment.cli("transfers", "report", "--since", "30d")


def test_a_closed_pipe_ends_the_command(shared_deployment):
    """`transfers list | head -1`: no panic, and the exit code of a program that SIGPIPE has ended."""
    for _ in range(2):
        shared_deployment.transfer_of_nothing()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "--config", shared_deployment.config, "transfers", "list"],
        cwd=shared_deployment.directory,
        env=clean_environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [OwnBbcp, OnPostgres], ids=["sqlite", "postgresql"])
def test_lists_of_100000_transfers(tmp_path, bbcp, broker, kind, tell):
    deployment = kind(tmp_path, bbcp, broker)
    try:
        big_lists.fill(deployment, kind is OnPostgres)
        took = {}
        for arguments, expected in big_lists.cases(deployment):
            # Only a query that is slow each time counts: a single slow run may be due to the load of the machine.
            for _ in range(3):
                began = time.monotonic()
                done = deployment.cli("transfers", "list", *arguments.split(), check=False)
                took[arguments] = min(time.monotonic() - began, took.get(arguments, 60))
                if took[arguments] < LISTS_WITHIN:
                    break
            assert done.returncode == 0, done.stderr
            rows = len(done.stdout.splitlines()) - 1
            of = re.search(r"(\d+) of (\d+); --limit 0 for all", done.stderr)
            found = int(of[2]) if of else rows
            assert expected is None or found == expected, (arguments, done.stderr)
            assert rows == min(found, 50), arguments
        slowest = sorted(took, key=took.get)[-3:]
        tell(f"{kind.__name__}: " + ", ".join(f"{a or 'all'} {took[a]:.3f} s" for a in reversed(slowest)))
        if "LISTS_WITHIN" in os.environ:
            for a, seconds in took.items():
                tell(f"  {seconds:.3f} s  list {a}")
        assert max(took.values()) < LISTS_WITHIN, took
    finally:
        deployment.close()
