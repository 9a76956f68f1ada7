"""Two hosts, fyst and koln, with a long link between them; docs/development/long-link.md describes them.

`Unavailable` says why there can be none, for example without root. Tests use the fixture `long_link` of conftest.py.
"""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from support import service, until

# Exit code of long-link where a link is impossible.
UNAVAILABLE = 77


class Unavailable(Exception):
    """This machine or user cannot have a long link."""


class LongLink:
    """A running link. `directory` must be new or empty, and is removed at the end."""

    def __init__(self, program, directory, *options):
        self.program, self.directory = str(program), Path(directory)
        self.started = []
        self.process = subprocess.Popen(
            [self.program, "run", "--directory", str(directory), *options],
            stdin=subprocess.PIPE,  # its end, also by our death, ends the link
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if not self.process.stdout.readline():
            _, reason = self.process.communicate(timeout=20)
            if self.process.returncode == UNAVAILABLE:
                raise Unavailable(reason.splitlines()[0])
            raise RuntimeError(f"long-link: code {self.process.returncode}: {reason}")

    def close(self):
        for process in self.started:
            end(process)
        self.process.stdin.close()
        self.process.wait(30)

    # --- the link

    def ask(self, request):
        """Sends a request over the control socket."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(20)
            connection.connect(str(self.directory / "control"))
            connection.sendall(f"{request}\n".encode())
            answer = json.loads(connection.makefile().readline())
        if "error" in answer:
            raise RuntimeError(f"{request}: {answer['error']}")
        return answer

    def set(self, sender=None, **properties):
        """Changes properties, e.g. set(delay="120ms", reorder_delay="5ms"); with `sender` only for its packets."""
        words = [f"{name.replace('_', '-')}={value}" for name, value in properties.items()]
        self.ask(" ".join(["set", *([sender] if sender else []), *words]))

    def cut(self):
        self.set(cut="yes")

    def mend(self):
        self.set(cut="no")

    @contextlib.contextmanager
    def interrupted(self):
        self.cut()
        try:
            yield
        finally:
            self.mend()

    def show(self):
        return self.ask("show")

    def reset(self):
        """Gives the link a round trip of 40 ms, without any fault. Tests are quick with it."""
        self.set(
            **{"delay": "20ms", "rate": "1000Mbit", "queue": "100ms", "mtu": 9000},
            **{"loss": "0", "reorder": "0", "largest": "none", "blocked": "none", "cut": "no"},
        )

    # --- the hosts

    def data(self, host):
        """The host's directory /data."""
        return self.directory / host / "data"

    def reboot(self, host, after=0):
        """Ends all processes of the host at once, and starts it again after some seconds. Does not wait for that."""
        self.ask(f"reboot {host} after={after}s")

    def is_on(self, host):
        return self.show()["hosts"][host]["pid"] is not None

    def command(self, host, argv):
        return [self.program, "on", "--in", str(self.directory), host, *map(str, argv)]

    def run_on(self, host, argv, check=True, timeout=60, **options):
        """Runs a command on a host; returns the finished process, with its output as text."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True} | options
        done = subprocess.run(self.command(host, argv), timeout=timeout, **options)
        if check and done.returncode:
            raise AssertionError(f"{argv} on {host}: code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def popen_on(self, host, argv, **options):
        """Starts a command on a host in a process group of its own, which ends with the link at the latest."""
        options = {"stdin": subprocess.DEVNULL, "text": True} | options
        process = subprocess.Popen(self.command(host, argv), start_new_session=True, **options)
        self.started.append(process)
        return process

    def processes(self, host):
        """Command lines of all processes of a host, by their process id there; without the first process and zombies."""
        first = self.show()["hosts"][host]["pid"]
        found = {}
        for directory in Path(f"/proc/{first}/root/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (directory / "cmdline").read_bytes().rstrip(b"\0")
                if line and directory.name != "1":
                    found[int(directory.name)] = line.replace(b"\0", b" ").decode(errors="replace")
        return found

    def sshd_log(self):
        return (self.directory / "koln/log/sshd.log").read_text(errors="replace")

    def sshd_logins(self):
        """Number of logins that the ssh server of koln has accepted."""
        return self.sshd_log().count("Accepted publickey for ")

    def round_trip_s(self):
        """Time that a TCP connection from fyst to koln takes: one round trip. The shortest of five, since this machine may
        be busy."""
        script = (
            "import socket, time\n"
            "def once():\n"
            "    began = time.perf_counter()\n"
            "    socket.create_connection(('koln', 22), 20).close()\n"
            "    return time.perf_counter() - began\n"
            "print(min(once() for _ in range(5)))"
        )
        return float(self.run_on("fyst", [sys.executable, "-c", script]).stdout)


def end(process):
    """Kills a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


class Sites:
    """A site on each host, with a location of files at each, a database and settings on fyst.

    `bbcp` is the path of bbcp on both hosts, and `program` that of ccat-transfer.
    """

    QUEUE = "ccat_buffer_data_transfer"

    def __init__(self, link, program, bbcp):
        self.link, self.program = link, str(program)
        self.origin, self.destination = (link.data(host) / "packages" for host in ("fyst", "koln"))
        for made in (self.origin, self.destination):
            made.mkdir()
        self.settings(bbcp={"program": str(bbcp), "remote_program": str(bbcp)})
        location = '[[sites.locations]]\nname = "buffer"\ntype = "buffer"\nstorage = "disk"\npath = "/data"\npriority = 1\n'
        sites = [
            f'[[sites]]\nname = "{name}"\nshort_name = "{name}"\nlocation = "there"\n{location}host = "{host}"\n'
            for name, host in (("ccat", ""), ("cologne", "koln"))
        ]
        route = '[[routes]]\norigin = "ccat"\ndestination = "cologne"\nmethod = "bbcp"\ntype = "direct"\n'
        (link.data("fyst") / "topology.toml").write_text("\n".join([*sites, route]))
        self.cli("db", "migrate")
        self.cli("db", "seed", "/data/topology.toml")

    @classmethod
    def for_tests(cls, link, double, directory):
        """Sites that use the real bbcp of BBCP_REAL, or else the double; `directory` is for a copy of its own."""
        link.reset()
        program = os.environ.get("BBCP_REAL")
        if program is None:
            program = directory / "bbcp"
            program.symlink_to(double)
            program.with_name("bbcp-double.env").write_text("BBCP_DOUBLE_NETWORK=1\nBBCP_DOUBLE_POLL=0.2\nBBCP_DOUBLE_ACCEPT=3\n")
        sites = cls(link, service("CCAT_TRANSFER_BIN"), program)
        # Small packages are copied by bbcp too, unless a test is about the other way.
        sites.settings(ssh={"max_package_bytes": 0})
        return sites

    def settings(self, **sections):
        """Writes the settings; `sections` are added to those that are needed, or to those of the last call."""
        current = getattr(self, "sections", None) or {
            "ops_db": {"database_type": "sqlite", "database_sqlite_database": "/data/ops.sqlite"},
            "transfer": {"log_dir": "/data/logs", "free_space_margin": 0},
            "bbcp": {"streams": 4, "progress_interval": 2, "kill_after": "1s"},
            "log": {"format": "json"},
        }
        for section, keys in sections.items():
            current[section] = current.get(section, {}) | keys
        self.sections = current
        lines = []
        for section, keys in current.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        (self.link.data("fyst") / "config.toml").write_text("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def settings_of_a_test(self):
        """Restores the settings at the end."""
        before = dict(self.sections)
        try:
            yield
        finally:
            self.sections = before
            self.settings()

    def command(self, *arguments):
        return [self.program, "--config", "/data/config.toml", *map(str, arguments)]

    def start_broker(self):
        """Starts a Redis on fyst, which can only be reached there; returns its URL for programs of this machine."""
        path = self.link.data("fyst") / "redis.sock"
        options = ["--unixsocket", "/data/redis.sock", "--save", "", "--appendonly", "no", "--dir", "/data"]
        self.link.popen_on("fyst", ["redis-server", *options], stdout=subprocess.DEVNULL)
        url = "redis://127.0.0.1:6379/0"
        self.settings(celery={"broker_url": url, "result_backend": url})
        ping = lambda: self.link.run_on("fyst", ["redis-cli", "ping"], check=False).stdout
        until(lambda: ping() == "PONG\n", "Redis answers on fyst")
        return f"redis+socket://{path}"

    def start_worker(self, concurrency):
        """Starts a worker on fyst; returns the process. Its log is `worker.log` in /data."""
        with open(self.link.data("fyst") / "worker.log", "ab") as log:
            command = self.command("worker", "-Q", self.QUEUE, "-n", "fyst@%h", "-c", concurrency)
            return self.link.popen_on("fyst", command, stdout=log, stderr=subprocess.STDOUT)

    def worker_log(self):
        return (self.link.data("fyst") / "worker.log").read_text(errors="replace")

    def statuses(self):
        """State and number of retries of each transfer."""
        with contextlib.closing(sqlite3.connect(self.link.data("fyst") / "ops.sqlite", timeout=20)) as database:
            rows = database.execute("SELECT id, upper(status), retry_count FROM data_transfer")
            return {transfer: (status, retries) for transfer, status, retries in rows}

    def cli(self, *arguments, **options):
        """Runs ccat-transfer on fyst; returns its standard output."""
        return self.link.run_on("fyst", self.command(*arguments), **options).stdout

    def package(self, name, size):
        """Creates a package of random data, and its transfer; returns the transfer's id."""
        (self.origin / name).write_bytes(os.urandom(size))
        between = ("--from", "ccat/buffer", "--to", "cologne/buffer")
        return int(self.cli("transfers", "create", "--package", f"packages/{name}", *between))

    def show(self, transfer):
        return json.loads(self.cli("transfers", "show", "--json", transfer))

    def start(self, transfer, **options):
        """Starts `transfers run` on fyst; returns the process."""
        return self.link.popen_on("fyst", self.command("transfers", "run", transfer), **options)

    def arrived(self, name):
        """Number of bytes at the destination, under the final or a temporary name."""
        sizes = [0]
        for path in [self.destination / name, *self.destination.glob(".ccat-transfer-*")]:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return max(sizes)
