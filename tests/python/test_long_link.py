"""Transfers between two hosts with a long link, which long_link.py starts. With BBCP_REAL, the real bbcp makes the copies.

The round trip is mostly 40 ms here, so that the tests are quick; scripts/bench.sh measures the real distance.
"""

import json
import os
import signal
import subprocess

import pytest
from celery import Celery

from long_link import LongLink, end
from support import MB, TRANSFER, sha256, until

pytestmark = pytest.mark.timeout(120)

SETTINGS = {"transfer": {"stall_timeout": "60s"}}


def assert_moved(sites, transfer, name):
    assert sites.show(transfer)["transfer"]["status"] == "COMPLETED"
    assert sha256(sites.origin / name) == sha256(sites.destination / name)
    assert [path.name for path in sites.destination.glob(".*")] == []


def sshd_answers(link):
    return link.is_on("koln") and link.run_on("fyst", ["ssh", "-oConnectTimeout=2", "koln", "true"], check=False).returncode == 0


def test_round_trip_is_as_configured(link):
    """A busy machine may add any time."""
    for delays, least, most in [({"delay": "120ms"}, 0.24, 0.48), ({"delay": "5ms"}, 0.01, 0.24), ({"sender": "koln", "delay": "50ms"}, 0.055, 0.11)]:
        link.set(**delays)

        def is_short(least=least, most=most):
            found = link.round_trip_s()
            assert found >= least
            return found < most

        until(is_short, f"the round trip takes less than {most} s")


def test_hosts_are_separate(link):
    for host, other in (("fyst", "koln"), ("koln", "fyst")):
        (link.data(host) / "own").write_text(f"{host}\n")
        shown = link.run_on(host, ["sh", "-c", f"hostname; cat /data/own; getent hosts {other}; echo $HOME; ls ~/.ssh"])
        name, own, found, home, *keys = shown.stdout.split("\n")
        assert (name, own, home) == (host, host, "/host/home"), shown.stdout
        assert found.startswith("10.99.0.")
        assert ("id_ed25519" in keys) == (host == "fyst")
    link.popen_on("fyst", ["sleep", "1234"])
    until(lambda: "sleep 1234" in link.processes("fyst").values(), "the process is on its host")
    assert all(line.startswith("sshd: ") for line in link.processes("koln").values())


@pytest.mark.parametrize("size", [0, MB])
def test_package_crosses_the_link_with_one_login(link, sites, size):
    name = f"one-{size}.tar"
    transfer = sites.package(name, size)
    before = link.sshd_logins()
    sites.cli("transfers", "run", transfer)
    assert_moved(sites, transfer, name)
    assert link.sshd_logins() - before == 1
    crossed = link.show()["hosts"]["fyst"]["sends"]["arrived_bytes"]
    assert crossed > size, "the data take another way than the link"


@pytest.mark.parametrize("size", [0, 3 * MB])
def test_small_package_crosses_the_link_without_bbcp(link, sites, size):
    sites.settings(ssh={"max_package_bytes": 4 * MB}, bbcp={"program": "/bin/false", "remote_program": "/bin/false"})
    name = f"small-{size}.tar"
    transfer = sites.package(name, size)
    before = link.sshd_logins()
    sites.cli("transfers", "run", transfer)
    assert_moved(sites, transfer, name)
    assert link.sshd_logins() - before == 1
    assert (sites.destination / name).stat().st_mode & 0o777 == 0o644


def test_worker_and_broker_run_on_a_host(link, sites):
    url = sites.start_broker()
    worker = sites.start_worker(2)
    until(lambda: "worker ready" in sites.worker_log(), "the worker is ready", log=sites.worker_log)
    transfer = sites.package("message.tar", MB)
    with Celery(broker=url, set_as_current=False) as app:
        app.send_task(TRANSFER, [transfer], queue=sites.QUEUE, ignore_result=True)
    until(lambda: sites.statuses()[transfer][0] == "COMPLETED", "the transfer is COMPLETED", 40, log=sites.worker_log)
    assert_moved(sites, transfer, "message.tar")
    end(worker)


def test_copy_survives_an_interruption(link, sites):
    sites.settings(bbcp={"max_rate": "1m"})
    transfer = sites.package("cut.tar", 3 * MB)
    process = sites.start(transfer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: sites.arrived("cut.tar") > MB // 2, "the copy is under way")
    with link.interrupted():
        until(lambda: link.show()["hosts"]["fyst"]["sends"]["lost_by_cut"] >= 3, "packets are lost")
        assert process.poll() is None
        assert sites.arrived("cut.tar") < 3 * MB
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert_moved(sites, transfer, "cut.tar")
    assert len(sites.show(transfer)["attempts"]) == 1


@pytest.mark.parametrize("settings, address", [({}, "10.99.0.2"), ({"reverse_connection": True}, "10.99.0.1"), ({"no_dns": False}, "koln")])
def test_blocked_data_ports_are_named(link, sites, settings, address):
    """Also bbcp's own connection, which would wait for two minutes, is ended."""
    ends = ["this host", "koln"][:: -1 if "reverse_connection" in settings else 1]
    caller, listener = ends
    sites.settings(bbcp={"port_range": "5031:5039"} | settings)
    link.set(blocked="5031-5039")
    transfer = sites.package(f"blocked-{address}.tar", 1000)
    failed = link.run_on("fyst", sites.command("transfers", "run", transfer), check=False)
    assert failed.returncode == 1
    text = sites.show(transfer)["attempts"][-1]["message"]
    assert f"{caller} could not connect to bbcp's data port 5031 at {listener}, which announced the address {address}; no connection arrived" in text
    assert sites.show(transfer)["attempts"][-1]["error_code"] == "data_port"
    for host in ("fyst", "koln"):
        until(lambda host=host: not [line for line in link.processes(host).values() if "bbcp" in line], f"no bbcp remains on {host}")


@pytest.mark.parametrize(
    "own_address, text",
    [
        ("127.0.1.1", "which announced the address 127.0.1.1; that is a loopback address, which only koln itself can reach"),
        ("10.99.0.1", "which announced the address 10.99.0.1; in the connection of ssh koln has the address 10.99.0.2"),
    ],
)
def test_wrong_announced_addresses_are_named(link, sites, own_address, text):
    """The own name of koln has another address there."""
    sites.settings(bbcp={"port_range": "5031:5039"})
    hosts = link.run_on("koln", ["cat", "/etc/hosts"]).stdout
    link.run_on("koln", ["sh", "-c", f"printf '{own_address} koln\n10.99.0.1 fyst\n' >/etc/hosts"])
    try:
        transfer = sites.package(f"wrong-{own_address}.tar", 1000)
        failed = link.run_on("fyst", sites.command("transfers", "run", transfer), check=False)
        assert failed.returncode == 1
        attempt = sites.show(transfer)["attempts"][-1]
        assert (attempt["error_code"], text in attempt["message"]) == ("data_port", True), attempt
        assert "Connection refused unable to connect to port" in attempt["message"]
    finally:
        link.run_on("koln", ["sh", "-c", f"cat >/etc/hosts <<'.'\n{hosts}.\n"])
    # With its name, or with the other end as listener, the copy succeeds.
    sites.settings(bbcp={"no_dns": False})
    sites.cli("transfers", "run", transfer)
    assert_moved(sites, transfer, f"wrong-{own_address}.tar")


def test_reboot_ends_processes_and_keeps_files(link):
    (link.data("koln") / "kept").write_text("kept")
    # Its end is not announced: fyst must find out by itself.
    remote = link.popen_on("fyst", ["ssh", "-oServerAliveInterval=1", "-oServerAliveCountMax=100", "koln", "sleep 4321"])
    until(lambda: "sleep 4321" in " ".join(link.processes("koln").values()), "the session has begun")
    link.reboot("koln", after=1)
    refused = link.run_on("koln", ["true"], check=False)
    assert (refused.returncode, refused.stderr) == (2, "long-link: koln is off\n")
    assert remote.poll() is None
    until(lambda: sshd_answers(link), "the ssh server answers again")
    assert remote.wait(20) == 255
    assert "sleep 4321" not in link.processes("koln").values()
    assert link.run_on("koln", ["cat", "/data/kept"]).stdout == "kept"


def test_large_packets_and_blocked_ports_are_lost(link):
    link.set(blocked="22")
    refused = link.run_on("fyst", ["ssh", "-oConnectTimeout=1", "koln", "true"], check=False)
    assert "timed out" in refused.stderr
    link.set(blocked="none", largest=600)
    waiting = link.popen_on("fyst", ["ssh", "koln", "true"])
    lost = lambda: sum(host["sends"]["lost_by_size"] for host in link.show()["hosts"].values())
    until(lambda: lost() > 1, "large packets are lost")
    assert waiting.poll() is None
    link.set(largest="none")
    assert waiting.wait(30) == 0
    link.set(mtu=600, largest=600)
    link.run_on("fyst", ["ssh", "koln", "true"])


def test_everything_ends_with_the_starter(long_link_program, tmp_path, long_link):
    directory = tmp_path / "second"
    link = LongLink(long_link_program, directory, "--delay", "1ms")
    link.run_on("koln", ["sh", "-c", "setsid sleep 5678 >/dev/null 2>&1 &"])
    first = [host["pid"] for host in link.show()["hosts"].values()]
    os.kill(link.process.pid, signal.SIGKILL)
    until(lambda: not directory.exists(), "the directory is removed")
    for pid in first:
        until(lambda pid=pid: not running(pid), f"the first process {pid} of a host has ended")
    assert not subprocess.run(["pgrep", "-f", "^sleep 5678$"], capture_output=True, check=False).stdout
    link.close()


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_missing_rights_are_reported(long_link_program):
    without = ["setpriv", "--bounding-set=-sys_admin"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*without, long_link_program, "run", "koln", "true"], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 77
    assert "long-link: no long link is possible here: " in done.stderr


def probe(link, sites, *arguments, check=True):
    return link.run_on("fyst", sites.command("links", "probe", *arguments), check=check)


def files(link):
    """All files of both hosts that a trial could leave, and the time stamps of the origin's."""
    found = set()
    for host in ("fyst", "koln"):
        found |= {(host, str(path.relative_to(link.data(host)))) for path in link.data(host).rglob("*") if "ops.sqlite" not in path.name and path.name != "logs"}
        found |= {(host, name) for name in link.run_on(host, ["sh", "-c", "ls -d /tmp/.ccat-transfer-* 2>/dev/null; true"]).stdout.split()}
    return found


@pytest.mark.parametrize("ends", [("ccat", "cologne"), ("cologne", "ccat")])
def test_probe_measures_a_link_and_leaves_nothing(link, sites, ends):
    sites.settings(bbcp={"streams": 3, "window": "2m"})
    before = files(link)
    found = json.loads(probe(link, sites, *ends, "--yes", "--size", 3 * MB, "--json").stdout)
    assert found["link"] == dict(zip(("origin", "destination"), ends))
    assert set(found["hosts"]) == {"this host", "koln"}
    assert found["round_trip_s"] >= 0.04
    for end, host in zip(("origin", "destination"), ("fyst", "koln") if ends[0] == "ccat" else ("koln", "fyst")):
        limits = link.run_on(host, ["cat", "/proc/sys/net/ipv4/tcp_rmem", "/proc/sys/net/ipv4/tcp_wmem"]).stdout.split()
        assert found["kernel"][end]["tcp_rmem"] + found["kernel"][end]["tcp_wmem"] == [int(word) for word in limits]
    assert [(trial["streams"], trial["bytes"]) for trial in found["trials"]] == [(1, 3 * MB), (3, 3 * MB)]
    assert all(trial["rate_bytes_per_s"] > 0 for trial in found["trials"])
    assert found["settings"].startswith(f'[[routes]]\norigin = "{ends[0]}"\ndestination = "{ends[1]}"\nbbcp = {{ streams = ')
    assert files(link) == before


def test_probe_ends_after_its_time(link, sites):
    sites.settings(bbcp={"max_rate": "1m"})
    before = files(link)
    found = json.loads(probe(link, sites, "ccat", "cologne", "--yes", "--duration", "2s", "--json").stdout)
    assert all(trial["bytes"] < 100 * MB for trial in found["trials"])
    assert found["expected_rate_bytes_per_s"] == MB
    assert files(link) == before


def test_probe_that_is_interrupted_leaves_nothing(link, sites):
    sites.settings(bbcp={"max_rate": "1m"})
    before = files(link)
    command = sites.command("links", "probe", "ccat", "cologne", "--yes")
    process = link.popen_on("fyst", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    trials = link.data("koln").glob
    until(lambda: [path for path in trials(".ccat-transfer-0-0-*") if path.stat().st_size], "a trial copies")
    link.run_on("fyst", ["pkill", "-INT", "-x", "ccat-transfer"])
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, "the copy was stopped" in output) == (1, True), output
    assert files(link) == before


def test_probe_asks_and_can_be_refused(link, sites):
    before = files(link)
    unasked = probe(link, sites, "ccat", "cologne", check=False)
    assert (unasked.returncode, "add --yes" in unasked.stderr) == (6, True), unasked.stderr
    unknown = probe(link, sites, "ccat", "colonge", "--yes", check=False)
    assert (unknown.returncode, "the nearest one is `cologne`" in unknown.stderr) == (3, True)
    link.set(blocked="5031-5039")
    sites.settings(bbcp={"port_range": "5031:5039"})
    closed = probe(link, sites, "ccat", "cologne", "--yes", check=False)
    assert (closed.returncode, "could not connect to bbcp's data port 5031 at koln" in closed.stderr) == (1, True), closed.stderr
    assert files(link) == before


def test_doctor_compares_the_buffers_with_the_link(link, sites):
    """2 streams of 4 MiB are too few for 240 ms; 64 are enough. Also what `links set` has set counts."""
    link.set(delay="120ms")

    def check():
        checks = json.loads(link.run_on("fyst", sites.command("doctor", "--json"), check=False).stdout)["checks"]
        (found,) = [check for check in checks if check["check"] == "tcp_buffers"]
        assert found["subject"] == "koln"
        assert "ccat → cologne: " in found["found"] and "at 1 Gbit/s (assumed" in found["found"]
        return found["verdict"], found["advice"] or ""

    sites.settings(bbcp={"streams": 2, "window": "=1m"})
    verdict, advice = check()
    assert verdict == "yellow"
    assert "a copy over ccat → cologne cannot use the whole link" in advice and "net.core.wmem_max on this host" in advice, advice
    sites.cli("links", "set", "ccat", "cologne", "--streams", "64", "--window", "=4m")
    try:
        assert check() == ("green", "")
    finally:
        sites.cli("links", "set", "ccat", "cologne", "--streams", "default", "--window", "default")
