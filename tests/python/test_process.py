"""The worker as a process: its pid file, the names of its files, and its output."""

import json
import socket
import subprocess

import pytest

from support import Deployment, Process, clean_environment, service, until
from test_operators import Terminal

BROKERS = ["rabbitmq", "redis"]

# Characters that a terminal executes: clear the screen, set its title, also by a control character of 8 bits; another
# line; and characters that reverse the direction of writing.
EVIL = "x\x1b[2J\x1b]0;gone\x07\u009b2J\r\nERROR forged \u202egpj\u2066"


def values(json):
    """All texts of a JSON value."""
    inner = json.values() if isinstance(json, dict) else json if isinstance(json, list) else []
    return ([json] if isinstance(json, str) else []) + [text for value in inner for text in values(value)]


def is_harmless(text):
    return not any(c in text for c in "\x1b\x07\u009b\r\u202e\u2066")


@pytest.fixture(scope="module")
def site(tmp_path_factory, bbcp, broker):
    deployment = Deployment(tmp_path_factory.mktemp("process"), bbcp, broker)
    yield deployment
    deployment.close()


def test_files_named_as_celery_names_them(site, broker):
    """File names contain the node's name, and the log continues in a new file after a rename, without a signal."""
    site.settings(log={"format": "human"})
    logs = site.directory / "files"
    logs.mkdir()
    node = f"n0-{site.origin_site}"
    worker = Process(
        [service("CCAT_TRANSFER_BIN"), "--config", site.config, "-f", logs / "%n%I.log", "worker", "-Q", site.queue]
        + ["--pidfile", logs / "%n.pid", "-n", f"n%i-{site.origin_site}@%h"],
        site.directory / "out.log",
        cwd=site.directory,
        env=clean_environment(),
    )
    site.processes.append(worker)
    log, old = logs / f"{node}.log", logs / f"{node}.log.1"
    until(lambda: log.exists() and "worker ready" in log.read_text(), "the worker is ready", log=worker.log)
    assert (logs / f"{node}.pid").read_text() == f"{worker.pid}\n"
    assert {path.name for path in logs.iterdir()} == {f"{node}.log", f"{node}.pid"}
    named = f"{node}@{socket.gethostname()}"
    with site.app() as app:
        assert set(app.control.inspect([named], timeout=10, limit=1).ping() or {}) == {named}

    # The log has one line for each invalid message, with text of its sender.
    def is_logged():
        broker.publish(site.queue, b"{}", {"lang": EVIL, "task": EVIL, "id": EVIL}, content_type=f"application/{EVIL}")
        until(lambda: broker.unsettled(site.queue) == 0, "it is rejected")

    is_logged()
    until(lambda: "rejected" in log.read_text() or "gpj" in log.read_text(), "it is logged", log=log.read_text)
    before = log.read_text()
    log.rename(old)
    is_logged()
    until(lambda: log.exists() and "gpj" in log.read_text(), "it is logged in a new file", log=old.read_text)
    assert old.read_text().count("gpj") == before.count("gpj")
    written = before + log.read_text()
    assert is_harmless(written) and "\nERROR forged" not in written
    assert "\\u{1b}[2J" in written and "\\u{202e}gpj" in written
    worker.stop()
    assert not (logs / f"{node}.pid").exists()


def test_an_unknown_abbreviation_is_wrong_usage(site):
    for arguments in (["-f", "%x.log", "worker"], ["worker", "--pidfile", "%N.pid"], ["worker", "-n", "%p@%h"]):
        done = site.cli(*arguments, check=False)
        assert done.returncode == 2 and "is unknown" in done.stderr, done.stderr


def test_a_pid_file_of_a_restarted_container(site):
    """The pid file contains the new worker's own id, which the previous worker had."""
    site.settings()
    pidfile = site.directory / "container.pid"
    program = ["sh", "-c", 'echo $$ >"$0"; exec "$@"', pidfile, service("CCAT_TRANSFER_BIN"), "--config", site.config]
    worker = Process(
        [*program, "worker", "-Q", site.queue, "--pidfile", pidfile],
        site.directory / "container.log",
        cwd=site.directory,
        env=clean_environment(),
    )
    site.processes.append(worker)
    worker.says("worker ready")
    assert int(pidfile.read_text()) == worker.pid
    # A second worker is refused, with the id of the first.
    second = site.cli("worker", "-Q", site.queue, "--pidfile", pidfile, check=False)
    assert second.returncode == 6 and f"its process {worker.pid} runs" in second.stderr
    worker.stop()


def test_foreign_text_is_shown_without_control_characters(site):
    """Control characters in a file's name, bbcp's output and a reason are escaped in tables, texts, JSON and errors."""
    site.settings(transfer={"max_retries": 0})
    transfer = site.package()
    site.double(PLAN="refused")
    site.cli("transfers", "run", transfer, check=False)
    (log,) = [row["log_path"] for row in site.rows("SELECT log_path FROM transfer_worker_attempt")]
    with open(log, "a") as file:
        file.write(f"bbcp: {EVIL}\n")
    name = f"packages/{EVIL}.tar"
    site.execute("UPDATE data_transfer SET failure_error_message = ? WHERE id = ?", EVIL, transfer)
    site.execute("UPDATE data_transfer_package SET relative_path = ?, file_name = ?", name, EVIL)
    site.execute("UPDATE data_transfer SET status = 'PENDING' WHERE id = ?", transfer)
    done = site.cli("transfers", "run", transfer, check=False)
    assert done.returncode != 0
    printed = done.stderr
    for command in (["show", transfer], ["list", "--limit", "0"], ["show", transfer, "--json"], ["list", "--json"]):
        printed += site.cli("transfers", *command)
    assert is_harmless(printed), printed
    assert "\\u{202e}gpj" in printed
    # The value in JSON is unchanged.
    assert name in values(json.loads(site.cli("transfers", "show", transfer, "--json")))
    terminal = Terminal(site, "log", transfer, "--attempt", "1")
    terminal.shows("gpj")
    assert terminal.ended() == 0
    seen = terminal.text.replace("\r\n", "\n")
    assert is_harmless(seen) and "\\u{1b}[2J" in seen and "\\u{202e}gpj" in seen, seen
    # Output to a file or another program is unchanged.
    assert EVIL.encode() in subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "--config", site.config, "transfers", "log", str(transfer), "--attempt", "1"],
        env=clean_environment(),
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout


def test_an_error_is_shown_without_control_characters(site):
    """Control characters in an error that quotes a file's name are escaped."""
    done = subprocess.run(
        [service("CCAT_TRANSFER_BIN"), "--config", f"/no/{EVIL}", "config", "check"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4 and is_harmless(done.stderr) and "\nERROR" not in done.stderr, done.stderr
    assert "\\u{202e}gpj" in done.stderr
