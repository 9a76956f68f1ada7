"""Transfers between two hosts with a round trip of 240 ms, against bbcp alone.

With BBCP_REAL, packages and link are as large as docs/PERFORMANCE.md describes; with the tests' double they are smaller.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import celery

from .copies import MB, TASK, bbcp, in_memory
from .sides import REPO, Comparison, Failed, Figures, Row, cpu_s, program, resident_mb

sys.path.insert(0, str(REPO / "tests/python"))
import long_link  # noqa: E402

# As the worker's defaults, without verification.
BARE = ("-v", "-P", "10", "-s", "16", "-w", "8m", "-y", "dd", "-n")


@dataclasses.dataclass
class Scale:
    """Sizes of the comparisons."""

    large: int
    small_packages: int
    small: int
    large_packages: int
    # Of the comparison with several large packages.
    rate_mbit: int


def scale(quick):
    if quick or "BBCP_REAL" not in os.environ:
        # The double has one TCP stream, which the kernel's buffers limit to 16 MB/s at this distance.
        return Scale(large=100 * MB, small_packages=24, small=MB, large_packages=4, rate_mbit=200)
    return Scale(large=1000 * MB, small_packages=100, small=10 * MB, large_packages=10, rate_mbit=1000)


@contextlib.contextmanager
def hosts(rate_mbit=1000):
    """New hosts, so that no run profits from what the kernel remembers of earlier ones; their files are in memory."""
    with in_memory() as name:
        try:
            link = long_link.LongLink(program("long-link"), pathlib.Path(name) / "link", "--rate", f"{rate_mbit}Mbit")
        except long_link.Unavailable as reason:
            raise Failed(str(reason)) from None
        try:
            yield Hosts(link, pathlib.Path(name))
        finally:
            link.close()


class Hosts(long_link.Sites):
    """Two hosts with packages at fyst."""

    def __init__(self, link, directory):
        super().__init__(link, program("ccat-transfer"), self.bbcp_for_both(directory))
        self.settings(bbcp={"streams": 16, "progress_interval": 10})

    @staticmethod
    def bbcp_for_both(directory):
        if "BBCP_REAL" in os.environ:
            return bbcp()
        path = directory / "bbcp"
        path.symlink_to(bbcp())
        # The real one sleeps for a second at its end.
        (directory / "bbcp-double.env").write_text("BBCP_DOUBLE_NETWORK=1\nBBCP_DOUBLE_ENDSLEEP=1\nBBCP_DOUBLE_POLL=0.2\n")
        return path

    def files(self, count, size, first=0):
        """Creates links to one file of random data, so that memory has it once; returns their names."""
        names = [f"{number}.tar" for number in range(first, first + count)]
        (self.origin / names[0]).write_bytes(os.urandom(size))
        for name in names[1:]:
            os.link(self.origin / names[0], self.origin / name)
        return names

    def hollow_files(self, count, size):
        """Creates links to one file without content; returns their names."""
        names = self.files(count, 0)
        os.truncate(self.origin / names[0], size)
        return names

    def worker_pid(self):
        """Process id of the worker on this machine."""
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[0].decode() == self.program and b"worker" in words:
                    return int(process.name)
        raise Failed("the worker has ended")

    # --- bbcp alone

    def bare(self, name):
        start = f"ssh -x -a -oBatchMode=yes %H {self.sections['bbcp']['remote_program']}"
        words = [self.sections["bbcp"]["program"], *BARE, "-T", start, "--", f"/data/packages/{name}", f"koln:/data/packages/{name}"]
        return self.link.run_on("fyst", ["env", "bbcp_CONFIGFN=/dev/null", *words], check=False, timeout=900)

    def bare_copies(self, names, concurrency):
        """Copies the files; a copy that fails, because sshd refuses simultaneous logins, is repeated. Returns their number."""

        def copy(name):
            failed = 0
            while True:
                (self.destination / name).unlink(missing_ok=True)
                done = self.bare(name)
                if done.returncode == 0:
                    return failed
                failed += 1
                if failed == 20:
                    raise Failed(f"bbcp: {done.stderr.strip()[-300:]}")

        with ThreadPoolExecutor(concurrency) as pool:
            return sum(pool.map(copy, names))

    # --- transfers

    @contextlib.contextmanager
    def worker(self, concurrency):
        """A worker and its broker on fyst, and a producer."""
        url = self.start_broker()
        process = self.start_worker(concurrency)
        deadline = time.monotonic() + 30
        while "worker ready" not in self.worker_log():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the worker does not start: {self.worker_log()[-500:]}")
            time.sleep(0.02)
        with celery.Celery(broker=url, set_as_current=False) as app:
            yield app

    def transfers(self, names):
        """Creates the transfers of existing packages."""
        create = ("transfers", "create", "--from", "ccat/buffer", "--to", "cologne/buffer", "--package")
        return [int(self.cli(*create, f"packages/{name}")) for name in names]

    def send(self, app, ids):
        for transfer in ids:
            app.send_task(TASK, [transfer], queue=self.QUEUE, ignore_result=True)

    def await_completed(self, app, ids, seconds):
        """Waits for the transfers. One that failed and is PENDING again is sent again, as a manager does; returns their number."""
        deadline = time.monotonic() + seconds
        sent_again = {}
        while True:
            rows = self.statuses()
            if all(rows[transfer][0] == "COMPLETED" for transfer in ids):
                return sum(sent_again.values())
            final = [transfer for transfer in ids if rows[transfer][0] == "FAILED"]
            if final or time.monotonic() > deadline:
                shown = json.dumps(self.show((final or ids)[0]))[-800:]
                raise Failed(f"not completed: {shown}")
            for transfer in ids:
                status, retries = rows[transfer]
                if status == "PENDING" and retries > sent_again.get(transfer, 0):
                    sent_again[transfer] = retries
                    self.send(app, [transfer])
            time.sleep(0.02)


class Growth:
    """Times of the first and the last byte at the destination."""

    def __init__(self, directory, size):
        self.directory, self.size = directory, size
        self.first = self.last = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()

    def watch(self):
        while self.last is None and not self.stopped.wait(0.02):
            grown = 0
            for path in self.directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    # Blocks, because the size of a file that is written out of order is that of its last part.
                    grown += path.stat().st_blocks * 512
            now = time.monotonic()
            if grown and self.first is None:
                self.first = now
            if grown >= self.size:
                self.last = now

    def share_of(self, rate_mbit):
        if self.last is None:
            raise Failed("the last byte was not seen")
        return self.size * 8 / (self.last - self.first) / (rate_mbit * 1e6)


def one_bare(size):
    def measure():
        with hosts() as here:
            names = here.files(1, size)
            began = time.monotonic()
            here.bare_copies(names, 1)
            return Figures(seconds=time.monotonic() - began)

    return measure


def one_transfer(size):
    """The first transfer of a worker, which logs in at the other host, and a later one."""

    def measure():
        with hosts() as here:
            ids = here.transfers(here.files(2, size))
            figures = Figures()
            with here.worker(1) as app:
                for name, transfer in zip(("first_s", "seconds"), ids):
                    began = time.monotonic()
                    here.send(app, [transfer])
                    here.await_completed(app, [transfer], 600)
                    figures[name] = time.monotonic() - began
            return figures

    return measure


def many_bare(count, size, concurrency, rate_mbit=1000):
    def measure():
        with hosts(rate_mbit) as here:
            names = here.files(count, size)
            began = time.monotonic()
            with Growth(here.destination, count * size) as growth:
                failed = here.bare_copies(names, concurrency)
            seconds = time.monotonic() - began
            return Figures(seconds=seconds, failed=failed, share=growth.share_of(rate_mbit))

    return measure


def many_transfers(count, size, concurrency, rate_mbit=1000, further=0):
    """With `further` transfers, which are prepared or completed while the others are copied."""

    def measure():
        with hosts(rate_mbit) as here:
            here.settings(transfer={"max_copies_per_link": concurrency if further else 0})
            ids = here.transfers(here.files(count, size))
            before = here.link.sshd_logins()
            with here.worker(concurrency + further) as app, Growth(here.destination, count * size) as growth:
                began = time.monotonic()
                here.send(app, ids)
                failed = here.await_completed(app, ids, 1800)
                seconds = time.monotonic() - began
            logins = here.link.sshd_logins() - before
            return Figures(seconds=seconds, failed=failed, share=growth.share_of(rate_mbit), logins=logins)

    return measure


def at_once(copies, seconds):
    """Memory and processor time of the worker itself while `copies` copies run, each at 1 MB/s."""

    def measure():
        with hosts() as here:
            # A fast digest, because only the work during the copies is measured. The other host need not know it: no copy ends.
            here.settings(
                bbcp={"max_rate": "1000k"},
                transfer={"digest": "xxh3"},
                ssh={"xxh3_command": ["sh", "-c", "cat >/dev/null; echo 0"]},
            )
            ids = here.transfers(here.hollow_files(copies, 512 * MB))
            with here.worker(copies) as app:
                here.send(app, ids)
                arriving = lambda: sum(path.stat().st_size > 0 for path in here.destination.glob(".ccat-transfer-*"))
                deadline = time.monotonic() + 120
                while arriving() < copies:
                    if time.monotonic() > deadline:
                        raise Failed(f"{arriving()} of {copies} copies run")
                    time.sleep(0.2)
                time.sleep(3)
                pid = here.worker_pid()
                used, began = cpu_s(pid), time.monotonic()
                time.sleep(seconds)
                cpu = (cpu_s(pid) - used) / (time.monotonic() - began) * 100
                running = sum(status == "IN_PROGRESS" for status, _ in here.statuses().values())
                if running < copies:
                    raise Failed(f"only {running} of {copies} copies ran all the time")
                return Figures(cpu_percent=cpu, resident_mb=resident_mb(pid))

    return measure


def comparisons(quick):
    if shutil.which("redis-cli") is None:
        return []
    sizes = scale(quick)
    double = "" if "BBCP_REAL" in os.environ else ", bbcp's double"
    ours, theirs = "ccat-transfer", "bbcp"
    named = lambda size: f"{size // (1000 * MB)} GB" if size >= 1000 * MB else f"{size // MB} MB"

    def single(size, target, stretch, **more):
        return Comparison(
            f"link-{named(size).replace(' ', '').lower()}",
            f"a package of {named(size)} over 240 ms{double}: message to COMPLETED, against bbcp alone without verification",
            {ours: one_transfer(size), theirs: one_bare(size)},
            [
                Row(f"{named(size)} over 240 ms, against bbcp with its own login", "s", "seconds", ours, theirs, target=target, stretch=stretch, at_most=True),
                Row(f"the same, first transfer of the worker{double}", "s", "first_s", ours, theirs, "seconds", at_most=True),
            ],
            warm_ups=0,
            extra=True,
            **more,
        )

    count, size = sizes.small_packages, sizes.small
    many = f"{count} packages of {named(size)} over 240 ms, 8 concurrent"
    large = f"{sizes.large_packages} packages of {named(sizes.large)}, 4 concurrent, over 240 ms and {sizes.rate_mbit} Mbit/s"
    return [
        single(MB, 1.0, 0.7),
        single(sizes.large, 1.08, 1.0),
        Comparison(
            "link-packages",
            f"{many}{double}",
            {ours: many_transfers(count, size, 8), theirs: many_bare(count, size, 8)},
            [
                Row(f"{many}, against bbcp", "s", "seconds", ours, theirs, target=0.8, stretch=0.5, at_most=True),
                Row(f"ssh logins for {count} transfers", "", "logins", ours, target=3, stretch=1, at_most=True),
                Row("transfers that failed once", "", "failed", ours, theirs, at_most=True),
            ],
            warm_ups=0,
            extra=True,
        ),
        Comparison(
            "link-rate",
            f"{large}{double}",
            {
                ours: many_transfers(sizes.large_packages, sizes.large, 4, sizes.rate_mbit, further=2),
                theirs: many_bare(sizes.large_packages, sizes.large, 4, sizes.rate_mbit),
            },
            [Row(f"{large}: share of the rate from first to last byte", "", "share", ours, target=0.85, stretch=0.93)],
            warm_ups=0,
            extra=True,
        ),
        Comparison(
            "link-copies",
            f"the worker while 32 copies run over 240 ms{double}",
            {ours: at_once(32, 10)},
            [
                Row("resident with 32 copies over 240 ms", "MB", "resident_mb", ours, target=38, at_most=True),
                Row("CPU of one core with 32 copies over 240 ms", "%", "cpu_percent", ours, target=1.2, at_most=True),
            ],
            warm_ups=0,
            pairs=3,
            extra=True,
        ),
    ]
