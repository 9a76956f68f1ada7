"""A copy that was interrupted is completed, and neither end reads more than one block again that it had read before.

RESUME_MB=2000 makes the package larger, and tests more kinds of interruption.
"""

import contextlib
import os
import re
import subprocess

import pytest

from support import MB, sha256, until

BLOCK = 64 << 20
SIZE = int(os.environ.get("RESUME_MB", "140")) * MB

pytestmark = pytest.mark.timeout(120 + SIZE // (5 * MB))

SETTINGS = {
    "transfer": {"stall_timeout": "4s", "resume_above": 1},
    "bbcp": {"max_rate": "30m"},
    "ssh": {"connect_timeout": "2s", "sha256_command": ["/data/counting-sha256sum"]},
}


@pytest.fixture(autouse=True)
def counted(sites):
    """The program that computes digests at the other host, which counts its calls."""
    program = sites.destination.parent / "counting-sha256sum"
    program.write_text("#!/bin/sh\necho call >>/data/calls\nexec sha256sum\n")
    program.chmod(0o755)


def calls(sites):
    with contextlib.suppress(FileNotFoundError):
        return (sites.destination.parent / "calls").read_text().count("call")
    return 0


def send(link, signal, pattern):
    [pid] = [pid for pid, line in link.processes("fyst").items() if re.match(pattern, line)]
    link.run_on("fyst", ["kill", f"-{signal}", pid])


def worker_is_killed(link):
    send(link, "KILL", "[^ ]*ccat-transfer .*transfers run")


def worker_is_stopped(link):
    send(link, "TERM", "[^ ]*ccat-transfer .*transfers run")


def link_is_cut(link):
    link.cut()


def other_host_reboots(link):
    link.reboot("koln", after=1)


def ssh_is_lost(link):
    send(link, "KILL", "[^ ]*ssh .*ControlMaster=yes")


FAULTS = [worker_is_killed, link_is_cut]
if "RESUME_MB" in os.environ:
    FAULTS += [worker_is_stopped, other_host_reboots, ssh_is_lost]


@pytest.mark.parametrize("fault", FAULTS)
def test_known_blocks_are_not_read_again(link, sites, fault):
    name = f"{fault.__name__}.tar"
    transfer = sites.package(name, SIZE)
    process = sites.start(transfer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # The last 10 % have begun, or the last block.
    known = min(SIZE * 9 // 10, SIZE - BLOCK // 2) // BLOCK * BLOCK
    until(lambda: sites.arrived(name) > known, "the copy is nearly complete", seconds=90)
    until(lambda: sites.show(transfer)["bytes_verified"] >= known, "its blocks are verified", seconds=20)
    fault(link)
    process.wait(60)
    link.mend()
    until(lambda: link.is_on("koln") and link.processes("koln"), "the host is there")
    assert sites.show(transfer)["bytes_verified"] >= known

    before = calls(sites)
    sites.cli("transfers", "run", transfer, timeout=90)
    assert sha256(sites.origin / name) == sha256(sites.destination / name)
    attempt = sites.show(transfer)["attempts"][-1]
    starts = [int(start) for start in re.findall("from byte (\\d+)", attempt["message"])]
    assert len(starts) == 2 and min(starts) >= known, attempt["message"]
    assert calls(sites) - before == -(-(SIZE - starts[1]) // BLOCK)
    assert sites.show(transfer)["bytes_verified"] is None


def test_an_empty_package(link, sites):
    transfer = sites.package("empty.tar", 0)
    sites.cli("transfers", "run", transfer)
    assert (sites.destination / "empty.tar").stat().st_size == 0


def test_a_pull_is_read_while_it_arrives(link, sites):
    topology = (link.data("fyst") / "topology.toml").read_text()
    reverse = topology.replace('origin = "ccat"', 'origin = "x"').replace('destination = "cologne"', 'destination = "ccat"').replace('"x"', '"cologne"')
    (link.data("fyst") / "reverse.toml").write_text(reverse)
    sites.cli("db", "seed", "/data/reverse.toml")
    (sites.destination / "pull.tar").write_bytes(os.urandom(80 * MB))
    between = ("--from", "cologne/buffer", "--to", "ccat/buffer")
    transfer = int(sites.cli("transfers", "create", "--package", "packages/pull.tar", *between))
    done = link.run_on("fyst", sites.command("transfers", "run", transfer), timeout=60)
    assert sha256(sites.origin / "pull.tar") == sha256(sites.destination / "pull.tar")
    assert "once more" not in done.stderr
    [attempt] = sites.show(transfer)["attempts"]
    assert attempt["message"] == "origin: counting-sha256sum, during the copy; destination: this program, during the copy"
