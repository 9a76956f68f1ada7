"""Types of the comparisons, and functions that run their sides."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import typing

import amqp

REPO = pathlib.Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A run failed and has no figures."""


class Figures(dict):
    """Measured values of a run, by name."""

    def show(self):
        return "  ".join(f"{name} {value:,.4g}" for name, value in self.items() if isinstance(value, (int, float)))


@dataclasses.dataclass
class Row:
    """A row of the table: one figure of one side, compared with the same or another figure of the other side."""

    title: str
    unit: str
    figure: str
    ours: str
    theirs: str | None = None
    their_figure: str | None = None
    # The ratio is theirs ÷ ours.
    inverted: bool = False
    # Targets for the ratio, or for the figure itself if there is no other side.
    target: float | None = None
    stretch: float | None = None
    at_most: bool = False

    def meets(self, value, target):
        return value <= target if self.at_most else value >= target


@dataclasses.dataclass
class Comparison:
    """Sides that are measured alternately."""

    name: str
    title: str
    sides: dict[str, typing.Callable[[], Figures]]
    rows: list[Row]
    warm_ups: int = 1
    pairs: int = 5
    # It runs only if it is named on the command line.
    extra: bool = False
    # Removes the data that all runs share.
    close: typing.Callable[[], None] = lambda: None


def program(name):
    return os.path.join(os.environ["BENCH_PROGRAMS"], name)


def bench(*arguments):
    """Runs ccat-bench; returns its only line of figures."""
    [figures] = bench_lines(*arguments)
    return figures


def redis_bench(*arguments):
    """Runs a command of ccat-bench for Redis; returns its only line of figures."""
    [figures] = bench_lines(*arguments, broker=os.environ["TEST_REDIS_URL"])
    return figures


def bench_lines(*arguments, broker=None, timeout=600):
    """Runs ccat-bench; returns the figures of every printed line."""
    command = [program("ccat-bench"), "--broker", broker or broker_uri(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    return [Figures(json.loads(line)) for line in done.stdout.splitlines()]


def broker_uri():
    """The broker's URL in the form of AMQP's URI specification: the virtual host `/` is `%2f`."""
    return os.environ["TEST_AMQP_URL"].removesuffix("//") + "/%2f"


@contextlib.contextmanager
def running(command, environment=None, ready=None):
    """A process group, killed at the end. Waits until its log contains `ready`."""
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as own:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            cwd=os.environ["RUN_DIR"],
            stdin=subprocess.DEVNULL,
            stdout=own,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 30
            while ready and ready not in pathlib.Path(own.name).read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{command[0]} does not start: {tail(own.name)}")
                time.sleep(0.02)
            yield process
        except Failed as error:
            raise Failed(f"{error}; its log ends: {tail(own.name)}") from None
        finally:
            stop(process)


def tail(path):
    return " | ".join(pathlib.Path(path).read_text(errors="replace").strip().splitlines()[-3:])[-400:]


def stop(process):
    """Kills it at once: the measurement is over, and a prefork pool would take four seconds to end by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@contextlib.contextmanager
def channel():
    url = os.environ["TEST_AMQP_URL"]
    login, place = url.removeprefix("amqp://").removesuffix("//").split("@")
    user, password = login.split(":")
    with amqp.Connection(place, user, password, virtual_host="/") as connection:
        yield connection.channel()


def children(pid):
    """A process and all its descendants."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += children(int(child))
    return found


def resident_mb(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def cpu_s(pid):
    """User and system time of one process without its children."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
