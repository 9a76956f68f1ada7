"""Transfers: bbcp alone, and bbcp under the worker."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import subprocess
import tempfile
import time

import celery

from .sides import Comparison, Failed, Figures, Row, channel, cpu_s, program, resident_mb, running

TASK = "ccat_data_transfer.transfer_manager.transfer_files_bbcp"
QUEUE = "ccat_buffer_data_transfer"
MB = 1_000_000


def bbcp():
    return os.environ.get("BBCP_REAL") or program("bbcp")


def bbcp_kind():
    return "real" if os.environ.get("BBCP_REAL") else "the tests' double"


def in_memory():
    """A directory in memory, so that no disk is measured."""
    shared = pathlib.Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="ccat-bench-", dir=shared if shared.is_dir() else os.environ["RUN_DIR"])


@contextlib.contextmanager
def site(**bbcp_settings):
    """Two directories in memory, a database and settings."""
    with in_memory() as name:
        yield Site(pathlib.Path(name), bbcp_settings)


class Package:
    """One package of random data for all runs of a comparison, created when the first run asks for it."""

    def __init__(self, size):
        self.size = size
        self.directory = None

    def path(self):
        if self.directory is None:
            self.directory = in_memory()
            write_noise(self.kept(), 0, self.size)
        return self.kept()

    def kept(self):
        return pathlib.Path(self.directory.name, "package.tar")

    def close(self):
        if self.directory is not None:
            self.directory.cleanup()
            self.directory = None


def write_noise(path, number, size, noise=b""):
    """Writes a file whose content is different for each number."""
    noise = noise or os.urandom(min(size, 64 * MB))
    with open(path, "wb") as file:
        file.write(number.to_bytes(8))
        left = size - 8
        while left > 0:
            left -= file.write(noise[:left])


class Site:
    def __init__(self, directory, bbcp_settings):
        self.directory = directory
        for name in ("origin", "destination"):
            (directory / name).mkdir()
        settings = {
            "celery": {"broker_url": os.environ["TEST_AMQP_URL"], "result_backend": "rpc://"},
            "ops_db": {"database_type": "sqlite", "database_sqlite_database": str(directory / "ops.sqlite")},
            "transfer": {"log_dir": str(directory / "logs"), "free_space_margin": 0},
            "bbcp": {"program": bbcp(), "streams": 4, **bbcp_settings},
            "log": {"format": "json"},
        }
        self.config = directory / "config.toml"
        with open(self.config, "w") as file:
            for section, keys in settings.items():
                print(f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()), sep="\n", file=file)
        location = '[[sites.locations]]\nname = "buffer"\ntype = "buffer"\nstorage = "disk"\nhost = ""\npriority = 1\npath = '
        sites = [
            f'[[sites]]\nname = "{short}"\nshort_name = "{short}"\nlocation = "here"\n{location}{json.dumps(str(directory / place))}\n'
            for short, place in (("ccat", "origin"), ("cologne", "destination"))
        ]
        route = '[[routes]]\norigin = "ccat"\ndestination = "cologne"\nmethod = "bbcp"\ntype = "direct"\n'
        (directory / "topology.toml").write_text("\n".join([*sites, route]))
        with channel() as open_channel:  # removes messages of an earlier worker that was killed
            open_channel.queue_delete(QUEUE)
        self.cli("db", "migrate")
        self.cli("db", "seed", str(directory / "topology.toml"))
        self.database = sqlite3.connect(directory / "ops.sqlite", timeout=30, isolation_level=None)
        self.app = celery.Celery("bench", broker=os.environ["TEST_AMQP_URL"], set_as_current=False)

    def cli(self, *arguments):
        command = [program("ccat-transfer"), "--config", str(self.config), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Failed(done.stderr.strip())
        return done.stdout

    def packages(self, count, size, hollow=False):
        """Creates packages of random data, or sparse files, and their transfers; returns the transfers' ids."""
        noise = os.urandom(min(size, 64 * MB))
        for number in range(count):
            path = self.origin() / f"{number}.tar"
            if hollow:
                path.touch()
                os.truncate(path, size)
            else:
                write_noise(path, number, size, noise)
        return self.transfers(count)

    def package(self, package, checksum=None):
        """Links an existing package, and creates its transfer; returns a list with its id."""
        os.link(package.path(), self.origin() / "0.tar")
        return self.transfers(1, checksum)

    def origin(self):
        directory = self.directory / "origin/packages"
        directory.mkdir(exist_ok=True)
        return directory

    def transfers(self, count, checksum=None):
        """Creates the transfers of the existing packages."""
        recorded = [] if checksum is None else ["--checksum", checksum(self.directory / "origin/packages/0.tar")]
        create = ["transfers", "create", "--package", "packages/0.tar", "--from", "ccat/buffer", "--to", "cologne/buffer"]
        first = int(self.cli(*create, *recorded))
        ids = [first]
        # The other rows are copies of the first one.
        self.database.execute("BEGIN")
        for number in range(1, count):
            package = self.copy_of("data_transfer_package", "(SELECT data_transfer_package_id FROM data_transfer WHERE id = ?)", first)
            for column in ("file_name", "relative_path"):
                if column in package:
                    package[column] = package[column].replace("0.tar", f"{number}.tar")
            transfer = self.copy_of("data_transfer", "?", first)
            transfer["data_transfer_package_id"] = self.insert("data_transfer_package", package)
            ids.append(self.insert("data_transfer", transfer))
        self.database.execute("COMMIT")
        return ids

    def copy_of(self, table, key, value):
        cursor = self.database.execute(f"SELECT * FROM {table} WHERE id = {key}", [value])
        row = dict(zip((column[0] for column in cursor.description), cursor.fetchone()))
        del row["id"]
        return row

    def insert(self, table, row):
        marks = ", ".join("?" * len(row))
        cursor = self.database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", [*row.values()])
        return cursor.lastrowid

    def worker(self, concurrency, **environment):
        command = [program("ccat-transfer"), "--config", str(self.config), "worker", "-Q", QUEUE, "-c", str(concurrency)]
        return running(command, environment, ready="worker ready")

    def send(self, ids):
        with self.app.connection_for_write() as connection, connection.channel() as open_channel:
            queue = self.app.amqp.queues[QUEUE] if QUEUE in self.app.amqp.queues else None
            for transfer in ids:
                self.app.send_task(TASK, [transfer], queue=queue or QUEUE, connection=connection, ignore_result=True)
            del open_channel

    def await_all(self, ids, seconds=300):
        deadline = time.monotonic() + seconds
        while True:
            states = dict(self.database.execute("SELECT upper(status), count(*) FROM data_transfer GROUP BY 1"))
            if states.get("COMPLETED", 0) == len(ids):
                return
            if states.get("FAILED") or time.monotonic() > deadline:
                raise Failed(f"transfers are {states}: {self.cli('transfers', 'show', str(ids[0]))}")
            time.sleep(0.02)  # polling takes processor time from the copy

    def close(self):
        self.database.close()


def sha256(path):
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def arguments(source, target, rate=None):
    """The arguments that the worker passes to bbcp, for a copy without resume."""
    options = ["-v", "-P", "10", "-s", "4", "-w", "8m", *(["-x", rate] if rate else []), "-y", "dd", "-e", "-E", "c32c=/dev/stdout", "-n", "--"]
    return [bbcp(), *options, str(source), str(target)]


def bare(source, target, rate=None):
    subprocess.run(arguments(source, target, rate), check=True, capture_output=True, timeout=300)


def bare_copy(package, rate=None):
    """bbcp alone; then both digests at once."""

    def measure():
        with site() as here:
            here.package(package)
            source, target = here.directory / "origin/packages/0.tar", here.directory / "destination/0.tar"
            began = time.monotonic()
            bare(source, target, rate)
            figures = Figures(copy_s=time.monotonic() - began)
            # openssl, because Debian's sha256sum does not use the processor's instructions for SHA-256.
            digest = ["openssl", "dgst", "-sha256"]
            both = [subprocess.Popen([*digest, path], stdout=subprocess.DEVNULL) for path in (source, target)]
            if any(process.wait(300) for process in both):
                raise Failed("openssl dgst failed")
            figures["verified_s"] = time.monotonic() - began
            here.close()
        return figures

    return measure


def transfer(package, recorded, rate=None):
    """The same under the worker, from the message to COMPLETED; bbcp's own time comes from the worker's log."""

    def measure():
        with site(window="8m", **({"max_rate": rate} if rate else {})) as here:
            ids = here.package(package, checksum=sha256 if recorded else None)
            with here.worker(1, CCAT_DATA_TRANSFER_TRANSFER__RESUME="false") as process:
                used = cpu_s(process.pid)
                began = time.monotonic()
                here.send(ids)
                here.await_all(ids)
                whole = time.monotonic() - began
                figures = Figures(verified_s=whole, worker_cpu_s=cpu_s(process.pid) - used)
                log = pathlib.Path(f"/proc/{process.pid}/fd/1").read_text(errors="replace")
            for line in log.splitlines():
                if "copy finished" in line:
                    figures["copy_s"] = json.loads(line)["elapsed_s"]
            here.close()
        return figures

    return measure


def many_bare(count, size):
    """Copies small files by one bbcp each, four at a time, without verification."""

    def measure():
        with site() as here:
            here.packages(count, size)
            script = 'exec "$@" "$SOURCE/$0" "$TARGET/$0"'
            names = "\0".join(f"{number}.tar" for number in range(count))
            words = arguments("", "")[:-2]
            began = time.monotonic()
            subprocess.run(
                ["xargs", "-0", "-n", "1", "-P", "4", "-I", "{}", "sh", "-c", script, "{}", *words],
                input=names,
                text=True,
                check=True,
                capture_output=True,
                timeout=600,
                env={**os.environ, "SOURCE": str(here.directory / "origin/packages"), "TARGET": str(here.directory / "destination")},
            )
            here.close()
            return Figures(seconds=time.monotonic() - began, files=count)

    return measure


def many_transfers(count, size):
    """Copies the same files as transfers: each with its lease, both digests, its attempt and its result."""

    def measure():
        with site(window="8m") as here:
            ids = here.packages(count, size)
            with here.worker(4) as process:
                used = cpu_s(process.pid)
                began = time.monotonic()
                here.send(ids)
                here.await_all(ids, seconds=600)
                seconds = time.monotonic() - began
                figures = Figures(seconds=seconds, files=count, worker_cpu_s=cpu_s(process.pid) - used)
            here.close()
            return figures

    return measure


def at_once(copies, seconds):
    """Memory and processor time of the worker itself while `copies` copies run, each at 1 MB/s."""

    def measure():
        with site(window="8m", max_rate="1000k") as here:
            figures = Figures()
            # So large that the reader of the origin has to wait for the copy.
            ids = here.packages(copies, 512 * MB, hollow=True)
            # A fast digest, because only the work during the copies is measured.
            with here.worker(copies, CCAT_DATA_TRANSFER_TRANSFER__DIGEST="xxh3") as process:
                time.sleep(1)
                figures["idle_mb"] = resident_mb(process.pid)
                here.send(ids)
                until = time.monotonic() + 30
                count = lambda: here.database.execute("SELECT count(*) FROM transfer_worker_lease").fetchone()[0]
                while count() < copies:
                    if time.monotonic() > until:
                        raise Failed(f"{count()} of {copies} copies run")
                    time.sleep(0.05)
                time.sleep(3)
                used, began = cpu_s(process.pid), time.monotonic()
                time.sleep(seconds)
                figures["cpu_percent"] = (cpu_s(process.pid) - used) / (time.monotonic() - began) * 100
                figures["resident_mb"] = resident_mb(process.pid)
                figures["running"] = count()
                if figures["running"] < copies:
                    raise Failed(f"only {figures['running']} of {copies} copies ran all the time")
            here.close()
        return figures

    return measure


def comparisons(quick):
    size = (200 if quick else 2000) * MB
    files = 100 if quick else 2000
    double = "" if os.environ.get("BBCP_REAL") else ", bbcp's double"
    if shutil.which("xargs") is None:
        raise SystemExit("bench: there is no xargs; install findutils")

    def copy(name, pace, package, sides, alone, rate=None, **more):
        return Comparison(
            name,
            f"a copy of {size // MB} MB{double}, in memory, {pace}: alone and under the worker",
            {
                **sides,
                "ccat-transfer": transfer(package, recorded=False, rate=rate),
                "bbcp + digests": bare_copy(package, rate),
            },
            [
                Row(f"bbcp's time under the worker, {pace}, against bbcp alone", "s", "copy_s", alone, "bbcp + digests", target=1.02, stretch=1.01, at_most=True),
                Row(f"message to COMPLETED, {pace}, against bbcp, then both digests at once (openssl)", "s", "verified_s", "ccat-transfer", "bbcp + digests", target=1.05, stretch=0.9, at_most=True),
            ],
            close=package.close,
            **more,
        )

    package = Package(size)
    recorded = "ccat-transfer, recorded"
    return [
        # With the origin's digest in the database the worker does not read beside the copy, which uses both processors here.
        # Two runs of the same bbcp differ by more than the target, so this comparison runs only if it is named.
        copy("copy", "as fast as memory", package, {recorded: transfer(package, recorded=True)}, alone=recorded, extra=True),
        # The rate of a link of 2 Gbit/s. Only this rate determines the time, so a difference of one percent is visible; the
        # origin is read beside the copy.
        copy("paced", "at 250 MB/s", package, {}, alone="ccat-transfer", rate="250000k", warm_ups=0),
        Comparison(
            "files",
            f"{files} files of 1 MB as transfers, -c 4, against as many bare bbcp{double}, four at a time",
            {"ccat-transfer": many_transfers(files, MB), "bbcp": many_bare(files, MB)},
            [Row(f"{files} files of 1 MB, against bare bbcp without verification", "s", "seconds", "ccat-transfer", "bbcp", at_most=True)],
            warm_ups=0,
            pairs=1,
        ),
        Comparison(
            "copies",
            "the worker while 32 copies run",
            {"ccat-transfer": at_once(32, 10)},
            [
                Row("resident, idle", "MB", "idle_mb", "ccat-transfer", target=25, stretch=18, at_most=True),
                Row("resident with 32 copies", "MB", "resident_mb", "ccat-transfer", target=60, stretch=35, at_most=True),
                Row("CPU of one core with 32 copies", "%", "cpu_percent", "ccat-transfer", target=1, stretch=0.2, at_most=True),
            ],
            warm_ups=0,
            pairs=3,
        ),
    ]
