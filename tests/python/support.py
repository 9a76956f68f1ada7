"""Base of the tests: a deployment of two sites, workers of both languages, and access to the broker.

No function waits by a fixed sleep; `until` polls for a condition, with a deadline.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from celery import Celery

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
MODULE = "ccat_data_transfer.transfer_manager"
TRANSFER = f"{MODULE}.transfer_files_bbcp"
SCHEDULE = f"{MODULE}.transfer_transfer_packages"
MB = 1024 * 1024

#: Options of a task that has expired. `expires` sets the property `expiration` too, by which RabbitMQ may discard the
#: message before a worker sees it.
EXPIRED = {"headers": {"expires": "2026-01-01T00:00:00+00:00"}}


def service(name):
    """Address of a service, which scripts/lib/services.sh exports."""
    try:
        return os.environ[name]
    except KeyError:
        raise RuntimeError(f"{name} is not set: run these tests by scripts/test.sh") from None


def backend_url(kind):
    return {"rpc": "rpc://", "redis": service("TEST_REDIS_URL")}[kind]


def until(condition, what, seconds=20, log=None):
    """Polls until `condition()` is true, and returns its value. At the deadline it fails with the end of `log()`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            said = f"; the log's end:\n{log()[-3000:]}" if log else ""
            raise AssertionError(f"not within {seconds} s: {what}{said}")
        time.sleep(0.02)


def clean_environment(**more):
    """Our environment without the variables that a program under test would read as settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "CCAT_DATA", "CCAT_OPS", "TASKS_WORKER", "BBCP", "OTEL"))}
    return kept | {k: str(v) for k, v in more.items()}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- workers


class Process:
    """A program under test, with its log in a file."""

    def __init__(self, command, log, **options):
        self.log_path = log
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.pid = self.process.pid

    def log(self):
        return self.log_path.read_text(errors="replace")

    def running(self):
        return self.process.poll() is None

    def says(self, text, seconds=20):
        """Waits for `text` in the log."""

        def said():
            assert self.running() or text in self.log(), f"ended early:\n{self.log()[-3000:]}"
            return text in self.log()

        until(said, f"{text!r} in {self.log_path}", seconds, log=self.log)
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def ended(self, seconds=20):
        """Waits for the end; returns the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log()[-3000:]}") from None

    def kill(self):
        if self.running():
            self.process.kill()
        self.process.wait()

    def stop(self):
        """Ends it by all available means."""
        if self.running():
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()


def tasks_worker(directory, queue, broker, backend, *flags, variables=None, **settings):
    """The Rust worker of the example tasks_worker; `settings` are keys of [celery], `variables` are environment variables."""
    environment = {f"TASKS_WORKER_CELERY__{k.upper()}": v for k, v in settings.items()}
    environment |= {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": backend, "TASKS_WORKER_LOG__FORMAT": "json"}
    worker = Process(
        [Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "tasks_worker"]
        + ["-Q", queue, "-n", f"tasks-{queue.replace(',', '-')}@%h", "-E", *flags],
        directory / f"tasks-{queue[:40]}.log",
        cwd=directory,
        env=clean_environment(**environment | (variables or {})),
    )
    return worker.says("worker ready")


def python_worker(
    directory,
    queue,
    broker,
    backend,
    *flags,
    pool="solo",
    settings=None,
    mingle=False,
    gossip=False,
    asks=True,
    interpreter=sys.executable,
):
    """A real Celery worker, see peer.py; `settings` are further settings of Celery. Without `asks` the caller waits."""
    flags = [*(() if mingle else ["--without-mingle"]), *(() if gossip else ["--without-gossip"]), *flags]
    worker = Process(
        [interpreter, "-m", "celery", "-A", "peer", "worker", "-Q", queue, "-n", f"peer-{queue}@%h"]
        + ["-P", pool, "-l", "INFO", *flags],
        directory / f"peer-{queue}.log",
        cwd=HERE,
        env=clean_environment(
            CELERY_BROKER_URL=broker.url, CELERY_RESULT_BACKEND=backend, PEER_SETTINGS=json.dumps(settings or {})
        ),
    )
    if asks:
        until(lambda: broker.consumers(queue) or not worker.running(), "the Python worker listens", 60)
    assert worker.running(), worker.log()
    return worker


KINDS = ["python", "rust"]


class Workers:
    """A worker of each kind, each on a queue of its own, and a client of both.

    `backend` is an address; `python` are settings of Python's worker and of the client, `rust` are keys of [celery];
    `flags` are for both workers. The other one is started when the `first` one has stored a result. `of_python` are
    further arguments of `python_worker`.
    """

    def __init__(
        self, directory, broker, *flags, backend=None, python=None, rust=None, pool="prefork", first=None, **of_python
    ):
        self.broker, self.processes = broker, {}
        backend = backend or backend_url("redis")
        tag = uuid.uuid4().hex[:8]
        # The policy of conftest.py gives queues of this name a dead-letter queue.
        self.queues = {kind: f"{kind}{tag}_data_transfer" for kind in KINDS}
        for queue in self.queues.values():
            broker.declare(queue)
        self.app = Celery(broker=broker.url, backend=backend, set_as_current=False)
        # The workers create the tables.
        self.app.conf.update(python or {}, database_create_tables_at_setup=False)
        flags_of_python = ("-E", "-c", "2", *flags)
        start = {
            "python": lambda queue: python_worker(
                directory, queue, broker, backend, *flags_of_python, pool=pool, settings=python, **of_python
            ),
            "rust": lambda queue: tasks_worker(directory, queue, broker, backend, *flags, **(rust or {})),
        }
        for kind in sorted(KINDS, key=lambda kind: kind != first):
            self.processes[kind] = start[kind](self.queues[kind])
            if first:
                assert self.send(kind, "add", 1, 1).get(timeout=30) == 2

    def send(self, kind, task, *args, **options):
        return self.app.send_task(f"tasks.{task}", args, queue=self.queues[kind], **options)

    def close(self):
        for process in self.processes.values():
            process.stop()
        self.app.close()
        for queue in self.queues.values():
            self.broker.delete(queue)


@contextlib.contextmanager
def held(processes):
    """Freezes processes, and continues them at the end."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def descendants(pid):
    """Ids of all descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


# ---------------------------------------------------------------- events


@contextlib.contextmanager
def events(app):
    """Collects events from now on; a worker has to run, because its heartbeats show that the collecting has begun."""
    seen = []
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})

        def receive():
            # Without a time limit: at its end the queue is removed, and events are lost until the next queue
            # exists.
            while not receiver.should_stop:
                with contextlib.suppress(OSError):
                    receiver.capture(limit=None, timeout=None, wakeup=False)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        try:
            until(lambda: seen, "a heartbeat is seen")
            yield seen
        finally:
            receiver.should_stop = True
            thread.join(10)


def types(seen, **fields):
    return [event["type"] for event in seen if all(event.get(k) == v for k, v in fields.items())]


# ---------------------------------------------------------------- a deployment


class Deployment:
    """Two sites on this host, their database, the settings, and a bbcp of their own.

    Every deployment has its own site names, and by that its own queue.
    """

    def __init__(self, directory, bbcp, broker):
        self.directory = directory
        self.broker = broker
        self.bbcp = bbcp
        tag = uuid.uuid4().hex[:8]
        self.origin_site, self.destination_site = f"o{tag}", f"d{tag}"
        self.queue = f"{self.origin_site}_buffer_data_transfer"
        self.origin, self.destination = directory / "origin", directory / "destination"
        self.database = directory / "ops.sqlite"
        self.config = directory / "config.toml"
        self.double_log = directory / "bbcp.log"
        self.processes = []

        for made in (self.origin, self.destination, directory / "bin"):
            made.mkdir()
        self.program = directory / "bin" / "bbcp"
        self.program.symlink_to(bbcp)
        self.double()
        self.settings()
        topology = directory / "topology.toml"
        topology.write_text(
            f"""
[[sites]]
name = "Observatory {tag}"
short_name = "{self.origin_site}"
location = "Chile"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = ""
path = "{self.origin}"
priority = 1

[[sites]]
name = "Archive {tag}"
short_name = "{self.destination_site}"
location = "Germany"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = ""
path = "{self.destination}"
priority = 1

[[routes]]
origin = "{self.origin_site}"
destination = "{self.destination_site}"
method = "bbcp"
type = "direct"
"""
        )
        self.cli("db", "migrate")
        self.cli("db", "seed", topology)
        broker.declare(self.queue)

    # --- settings

    def settings(self, backend="redis", **sections):
        """Writes the worker's settings; `sections` are further keys, e.g. transfer={"max_retries": 1}."""
        settings = {
            "celery": {"broker_url": self.broker.url, "result_backend": backend_url(backend)},
            "ops_db": self.ops_db(),
            "transfer": {
                "log_dir": str(self.directory / "logs"),
                "free_space_margin": 0,
                # Short, for the tests that wait until a lease expires.
                "lease_ttl": "3s",
                "lease_renew_interval": "500ms",
                # At once; tests/python/test_delays.py has waits.
                "retry_delay_first": "0s",
                "retry_delay_storage": "0s",
            },
            "bbcp": {"program": str(self.program), "streams": 2, "progress_interval": 2, "kill_after": "1s"},
            "manager": {"sleep_time": "1s"},
            "celery.broker_transport_options": self.broker.transport_options,
            "log": {"level": "info", "format": "json"},
        }
        for section, keys in sections.items():
            settings.setdefault(section, {}).update(keys)
        with open(self.config, "w") as file:
            for section, keys in settings.items():
                print(f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items()), sep="\n", file=file)

    def ops_db(self):
        """Settings of the database."""
        return {"database_type": "sqlite", "database_sqlite_database": str(self.database)}

    def double(self, **knobs):
        """Replaces the options of the test double, e.g. PLAN="stall@50%", RATE=MB."""
        knobs = {"LOG": self.double_log, "TICK": 0.1, "POLL": 0.2} | knobs
        lines = "".join(f"BBCP_DOUBLE_{name}={value}\n" for name, value in knobs.items())
        (self.program.parent / "bbcp-double.state").unlink(missing_ok=True)
        (self.program.parent / "bbcp-double.env").write_text(lines)

    # --- programs

    def cli(self, *args, timeout=60, check=True, **environment):
        """Runs ccat-transfer; returns its standard output, or the finished process with check=False."""
        done = subprocess.run(
            [service("CCAT_TRANSFER_BIN"), "--config", self.config, *map(str, args)],
            cwd=self.directory,
            env=clean_environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not check:
            return done
        assert done.returncode == 0, f"{args}: code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def worker(self, concurrency=2, ready=True, name="rust", flags=(), **environment):
        """Starts a worker on this deployment's queue."""
        log = self.directory / f"worker-{len(self.processes)}.log"
        worker = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", self.config]
            + ["worker", "-Q", self.queue, "-n", f"{name}-{self.origin_site}@%h", "-c", concurrency, *flags],
            log,
            cwd=self.directory,
            env=clean_environment(**environment),
        )
        self.processes.append(worker)
        return worker.says("worker ready") if ready else worker

    def schedule(self):
        """Runs one pass of the manager."""
        return self.cli("manager", "--once")

    @contextlib.contextmanager
    def app(self, backend="redis"):
        """A Python producer."""
        app = Celery(broker=self.broker.url, backend=backend_url(backend), set_as_current=False)
        app.conf.task_default_queue = self.queue
        try:
            yield app
        finally:
            app.close()

    # --- transfers

    def package(self, name=None, size=MB):
        """Creates a file at the origin and its transfer; returns the transfer's id."""
        name = name or f"packages/{uuid.uuid4().hex[:8]}.tar"
        path = self.origin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
        return self.transfer(name)

    def transfer(self, name):
        printed = self.cli(
            *("transfers", "create", "--package", name),
            *("--from", f"{self.origin_site}/buffer", "--to", f"{self.destination_site}/buffer"),
        )
        ids = re.findall(r"\d+", printed)
        assert len(ids) == 1, f"`transfers create` should print the id, but printed {printed!r}"
        return int(ids[0])

    def transfer_of_nothing(self):
        """Creates a transfer whose package does not exist (any more)."""
        transfer = self.package(size=1)
        (self.origin / self.row(transfer)["relative_path"]).unlink()
        return transfer

    def execute(self, sql, *values):
        with contextlib.closing(sqlite3.connect(self.database, timeout=20)) as connection, connection:
            connection.execute(sql, values)

    def rows(self, sql, *values):
        with contextlib.closing(sqlite3.connect(self.database, timeout=20)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql, values)]

    def row(self, transfer):
        """The transfer's row, with the file's path below a location's root."""
        (row,) = self.rows(
            "SELECT t.*, p.relative_path FROM data_transfer t"
            " JOIN data_transfer_package p ON p.id = t.data_transfer_package_id WHERE t.id = ?",
            transfer,
        )
        return row

    def status(self, transfer):
        return self.row(transfer)["status"]

    def reaches(self, transfer, status, seconds=30):
        until(lambda: self.status(transfer) == status, f"transfer {transfer} is {status}", seconds)

    def outcomes(self, transfer):
        """Outcome of each attempt."""
        rows = self.rows(
            "SELECT outcome FROM transfer_worker_attempt WHERE data_transfer_id = ? ORDER BY attempt", transfer
        )
        return [row["outcome"] for row in rows]

    def leases(self):
        return self.rows("SELECT * FROM transfer_worker_lease")

    def assert_moved(self, transfer):
        """Asserts that the transfer is COMPLETED, its file is right, and no temporary file is left."""
        row = self.row(transfer)
        assert row["status"] == "COMPLETED", row
        name = row["relative_path"]
        assert sha256(self.origin / name) == sha256(self.destination / name)
        assert self.temporary_files(transfer) == []
        assert not [lease for lease in self.leases() if lease["data_transfer_id"] == transfer]

    # --- bbcp

    def temporary_files(self, transfer="*"):
        return sorted(self.destination.rglob(f".ccat-transfer-{transfer}-*"))

    def copied(self):
        """Number of bytes in temporary files."""
        total = 0
        for path in self.temporary_files():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def mid_copy(self, size=MB // 2):
        """Waits until a copy has written `size` bytes."""
        until(lambda: self.copied() >= size, "a copy is under way")

    def bbcp_processes(self):
        """Process ids of bbcp: agent, source, sink. The executable is unique to this test run."""
        found = []
        for exe in Path("/proc").glob("[0-9]*/exe"):
            with contextlib.suppress(OSError):
                if os.readlink(exe) == str(self.bbcp) and exe.parent.joinpath("cmdline").read_bytes():
                    found.append(int(exe.parent.name))
        return found

    def no_bbcp_left(self, seconds=15):
        until(lambda: not self.bbcp_processes(), "no bbcp is left", seconds)

    def copies(self):
        """The double's records of its copies; a query of its version is not recorded."""
        if not self.double_log.exists():
            return []
        records = [json.loads(line) for line in self.double_log.read_text().splitlines()]
        return [record for record in records if "-#" not in record["argv"]]

    # --- the end

    def close(self):
        for process in self.processes:
            process.kill()
        for pid in self.bbcp_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.broker.delete(self.queue)
        shutil.rmtree(self.directory, ignore_errors=True)
