"""Failures of a long link between two hosts, and of the other host: one verified file or none, and nothing is left."""

import json
import re
import subprocess

import pytest
from celery import Celery

from long_link import end
from support import MB, TRANSFER, sha256, until

pytestmark = pytest.mark.timeout(120)

SIZE = 4 * MB

SETTINGS = {"transfer": {"stall_timeout": "4s", "resume_above": 1}, "bbcp": {"max_rate": "1m"}, "ssh": {"connect_timeout": "2s"}}


class Copy:
    """A transfer whose first attempt runs."""

    def __init__(self, link, sites, name):
        self.link, self.sites, self.name = link, sites, name
        self.transfer = sites.package(name, SIZE)
        self.process = sites.start(self.transfer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until(lambda: sites.arrived(name) > MB // 2, "the copy is under way")

    def fails(self, *codes):
        """Waits for the end of the attempt, and returns the message of its failure."""
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 1, output
        attempt = self.attempts()[-1]
        assert attempt["error_code"] in codes, attempt
        assert not (self.sites.destination / self.name).exists()
        return attempt["message"]

    def attempts(self):
        return self.sites.show(self.transfer)["attempts"]

    def is_completed_by_the_next_attempt(self, resumed=True):
        """The next attempt completes the transfer, and nothing is left at either end."""
        arrived = self.sites.arrived(self.name)
        began = len(self.attempts())
        done = self.sites.link.run_on("fyst", self.sites.command("transfers", "run", self.transfer), timeout=90)
        assert sha256(self.sites.origin / self.name) == sha256(self.sites.destination / self.name)
        assert len(self.attempts()) == began + 1
        if resumed:
            [line] = [line for line in done.stderr.splitlines() if "resuming the partial copy" in line]
            assert json.loads(line)["bytes"] >= min(arrived, MB // 2)
        assert_clean(self.link, self.sites)


def assert_clean(link, sites):
    """No process of a copy and no file of one is left on either host."""
    ours = lambda host: [line for line in link.processes(host).values() if re.search("bbcp|ssh .*Control|ccat-transfer", line)]
    for host in ("fyst", "koln"):
        until(lambda host=host: not ours(host), f"no process is left on {host}", seconds=30, log=lambda host=host: str(ours(host)))
    assert list(sites.destination.glob(".*")) == []


def test_interruption_beyond_the_stall_timeout(link, sites):
    copy = Copy(link, sites, "long-cut.tar")
    with link.interrupted():
        assert "no byte" in copy.fails("stalled")
        # The next attempt finds the host unreachable.
        done = link.run_on("fyst", sites.command("transfers", "run", copy.transfer), check=False, timeout=60)
        assert done.returncode == 1
        assert copy.attempts()[-1]["error_code"] == "network", done.stderr
    copy.is_completed_by_the_next_attempt()


def test_loss_and_reordering_change_nothing(link, sites):
    link.set(loss="1%", reorder="5%", reorder_delay="10ms")
    copy = Copy(link, sites, "lossy.tar")
    output, _ = copy.process.communicate(timeout=90)
    assert copy.process.returncode == 0, output
    assert sha256(sites.origin / copy.name) == sha256(sites.destination / copy.name)
    assert_clean(link, sites)


def test_large_packets_are_dropped(link, sites):
    copy = Copy(link, sites, "black-hole.tar")
    link.set(largest=600)
    copy.fails("stalled")
    link.set(largest="none")
    copy.is_completed_by_the_next_attempt()


def test_other_host_reboots(link, sites):
    copy = Copy(link, sites, "reboot.tar")
    link.reboot("koln", after=1)
    copy.fails("network", "stalled", "remote_died")
    until(lambda: link.is_on("koln") and link.processes("koln"), "the host is back")
    copy.is_completed_by_the_next_attempt()


def test_ssh_connection_is_lost_while_data_flow(link, sites):
    copy = Copy(link, sites, "no-ssh.tar")
    [master] = [pid for pid, line in link.processes("fyst").items() if re.match("[^ ]*ssh .*ControlMaster=yes", line)]
    link.run_on("fyst", ["kill", "-KILL", master])
    copy.fails("network")
    copy.is_completed_by_the_next_attempt()


def through_ssh(sites):
    sites.settings(ssh={"max_package_bytes": 2 * SIZE})


def test_interrupted_copy_through_ssh(link, sites):
    through_ssh(sites)
    copy = Copy(link, sites, "ssh-cut.tar")
    with link.interrupted():
        assert "no byte" in copy.fails("stalled")
    copy.is_completed_by_the_next_attempt(resumed=False)
    [log] = (link.data("fyst") / f"logs/{copy.transfer}").glob(f"{copy.transfer}-1-*")
    assert "bbcp" not in log.read_text().replace("/bbcp-", ""), "bbcp is not used"


def test_killed_worker_leaves_no_part_of_a_copy_through_ssh(link, sites):
    through_ssh(sites)
    copy = Copy(link, sites, "ssh-killed.tar")
    link.run_on("fyst", ["pkill", "-KILL", "-x", "ccat-transfer"])
    copy.process.wait(10)
    until(lambda: sites.arrived("ssh-killed.tar") == 0, "the part is removed")
    assert_clean(link, sites)


def test_other_disk_becomes_full(link, sites):
    # bbcp ends some seconds after the error.
    sites.settings(transfer={"stall_timeout": "30s"})
    link.run_on("koln", ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", "/data/packages"])
    try:
        sites.destination, beneath = link.data("koln") / "packages", sites.destination
        transfer = sites.package("full.tar", SIZE)
        process = sites.start(transfer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        temporary = lambda: link.run_on("koln", ["sh", "-c", "ls -A /data/packages"]).stdout
        until(lambda: ".part" in temporary(), "the copy is under way")
        link.run_on("koln", ["sh", "-c", "head -c 4m /dev/zero >/data/packages/filler"], check=False)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
        assert sites.show(transfer)["attempts"][-1]["error_code"] == "storage_full", output
        link.run_on("koln", ["rm", "/data/packages/filler"])
        sites.cli("transfers", "run", transfer, timeout=60)
        assert temporary() == "full.tar\n"
        assert link.run_on("koln", ["sha256sum", "/data/packages/full.tar"]).stdout.split()[0] == sha256(sites.origin / "full.tar")
    finally:
        link.run_on("koln", ["umount", "/data/packages"])
        sites.destination = beneath


def test_other_clock_is_wrong(link, sites):
    """The hosts share the clock of the kernel. So the program `date`, which our scripts use, and the time stamps of files
    stand in for a clock that is an hour ahead, then an hour behind, in the middle of a transfer."""
    # bash reads the clock itself.
    (link.data("koln") / "date").write_text('#!/bin/bash\nprintf "%(%s)T\\n" "$(($(printf "%(%s)T" -1) + $(cat /data/hour)))"\n')
    (link.data("koln") / "date").chmod(0o755)
    hour = lambda seconds: (link.data("koln") / "hour").write_text(f"{seconds}\n")
    hour(3600)
    link.run_on("koln", ["sh", "-c", "mount --bind /data/date $(command -v date)"])
    try:
        checks = json.loads(sites.cli("doctor", "--json", check=False))["checks"]
        [clock] = [check for check in checks if (check["check"], check["subject"]) == ("clock", "koln")]
        assert clock["verdict"] == "red" and "ahead" in clock["found"], clock
        copy = Copy(link, sites, "clock.tar")
        hour(-3600)
        [master] = [pid for pid, line in link.processes("fyst").items() if re.match("[^ ]*ssh .*ControlMaster=yes", line)]
        link.run_on("fyst", ["kill", "-KILL", master])
        copy.fails("network")
        [partial] = sites.destination.glob(".ccat-transfer-*.part")
        link.run_on("koln", ["touch", "-d", "+1 hour", f"/data/packages/{partial.name}"])
        copy.is_completed_by_the_next_attempt()
    finally:
        link.run_on("koln", ["sh", "-c", "umount $(command -v date)"])


@pytest.mark.timeout(300)
def test_hundred_transfers_leave_only_the_connection(link, sites):
    """A worker with 100 transfers, 5 that fail and 3 that are cancelled during their copies."""
    sites.settings(transfer={"stall_timeout": "60s", "max_retries": 0}, ssh={"connect_timeout": "20s"})
    url, before = sites.start_broker(), link.sshd_logins()
    cancelled = [sites.package(f"cancelled-{number}.tar", 40 * MB) for number in range(3)]
    failing = [sites.package(f"failing-{number}.tar", 1) for number in range(5)]
    for path in sites.origin.glob("failing-*"):
        path.unlink()
    completed = [sites.package(f"quarter-{number}.tar", MB // 4) for number in range(92)]
    worker = sites.start_worker(8)
    with Celery(broker=url, set_as_current=False) as app:
        for transfer in [*cancelled, *failing, *completed]:
            app.send_task(TRANSFER, [transfer], queue=sites.QUEUE, ignore_result=True)
    attempts = lambda transfer: sites.show(transfer)["attempts"]
    copied = lambda transfer: (sites.show(transfer)["lease"] or {}).get("bytes_done", 0)
    until(lambda: all(copied(transfer) for transfer in cancelled), "the copies are under way", 60, log=sites.worker_log)
    sites.cli("transfers", "cancel", "--reason", "no longer needed", *cancelled)
    expected = dict.fromkeys(completed, "COMPLETED") | dict.fromkeys([*failing, *cancelled], "FAILED")
    ended = lambda: {transfer: sites.statuses()[transfer][0] for transfer in expected}
    until(lambda: ended() == expected, "all transfers have ended", 150, log=lambda: str(ended()))
    assert {attempts(transfer)[-1]["error_code"] for transfer in failing} == {"origin_missing"}
    until(lambda: all(attempts(transfer)[-1]["outcome"] for transfer in cancelled), "the cancelled copies have ended")
    assert 1 <= link.sshd_logins() - before <= 3
    # Only the connection, with its session and the shell for requests, and no process of a copy or a digest.
    matching = lambda host, pattern: [line for line in link.processes(host).values() if re.search(pattern, line)]
    known = {"fyst": "^cat$|^redis-server |^/usr/bin/ssh |ccat-transfer", "koln": "^sshd: root@|[^ ]*sshd .*(-D|listener)|ccat-transfer-"}
    others = lambda: [line for host, pattern in known.items() for line in link.processes(host).values() if not re.search(pattern, line)]
    until(lambda: not others() and not matching("fyst", "/bbcp"), "the copies' processes have ended", log=lambda: "\n".join(str(link.processes(host)) for host in known))
    assert len(matching("fyst", "^/usr/bin/ssh ")) == 1 == len(matching("koln", "^sshd: root@"))
    assert not list(sites.destination.glob(".*"))
    end(worker)
    assert_clean(link, sites)


def test_each_process_logs_in_once(link, sites):
    sites.settings(bbcp={"max_rate": ""})
    before = link.sshd_logins()
    for number in range(3):
        sites.cli("transfers", "run", sites.package(f"small-{number}.tar", MB))
    assert link.sshd_logins() - before == 3
    assert_clean(link, sites)
