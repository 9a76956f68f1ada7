"""Comparisons of the status page: the time of each resource with a large database, the first time and from the cache."""

import contextlib
import http.client
import os
import pathlib
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
import urllib.parse
import uuid

from .sides import Comparison, Failed, Figures, Row, program, running

#: Transfers in the table, attempts before the period, and attempts in it.
TRANSFERS, OLD, RECENT = 1_000_000, 200_000, 10_000

#: Requests of each path after the first one.
CACHED = 20

TOPOLOGY = """
[[sites]]
name = "Observatory"
short_name = "ccat"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
path = "/origin"

[[sites]]
name = "Archive"
short_name = "cologne"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
path = "/destination"

[[routes]]
origin = "ccat"
destination = "cologne"
method = "bbcp"
type = "direct"
"""


def paths(transfers):
    """Names of the figures, and paths. The first one is also the first request of the process."""
    return {
        "overview": "/api/v1/overview",
        "links": "/api/v1/links",
        "throughput, 24 h": "/api/v1/throughput?period=24h",
        "throughput, 30 d": "/api/v1/throughput?period=30d",
        "newest transfers": "/api/v1/transfers",
        "search by name": "/api/v1/transfers?package=night-7777",
        "search by state": "/api/v1/transfers?status=FAILED",
        "search by time and link": "/api/v1/transfers?origin=ccat&since=1h",
        "search by error": "/api/v1/transfers?error=origin_missing",
        "a completed transfer": f"/api/v1/transfers/{transfers // 2}",
        "a waiting transfer": f"/api/v1/transfers/{transfers}",
        "page: overview": "/",
        "page: link": "/links/ccat/cologne",
        "page: search by state": "/transfers?status=FAILED",
        "page: a waiting transfer": f"/transfers/{transfers - 1}",
    }


class Database:
    """An ops-db with very many transfers, made at the first use."""

    def __init__(self, kind, transfers):
        self.kind, self.transfers, self.directory = kind, transfers, None

    def settings(self):
        if self.directory is None:
            self.fill()
        return self.path / "config.toml"

    def fill(self):
        self.directory = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.directory.name)
        if self.kind == "sqlite":
            ops_db = f'database_type = "sqlite"\ndatabase_sqlite_database = "{self.path}/ops.sqlite"\n'
        else:
            self.server = urllib.parse.urlsplit(os.environ["TEST_POSTGRES_URL"])
            self.name = f"bench_{uuid.uuid4().hex}"
            self.psql("postgres", f"CREATE DATABASE {self.name}")
            ops_db = (
                f'database_type = "postgresql"\ndatabase_postgresql_database = "{self.name}"\n'
                f'database_postgresql_user = "{self.server.username}"\n'
                f'database_postgresql_host = "{self.server.hostname}"\ndatabase_postgresql_port = {self.server.port}\n'
            )
        (self.path / "config.toml").write_text(f'[ops_db]\n{ops_db}[log]\nformat = "human"\n')
        (self.path / "topology.toml").write_text(TOPOLOGY)
        for command in (["db", "migrate"], ["db", "seed", str(self.path / "topology.toml")]):
            subprocess.run(
                [program("ccat-transfer"), "--config", str(self.path / "config.toml"), *command], check=True, capture_output=True
            )
        statements = list(rows(self.transfers, self.kind == "postgresql"))
        if self.kind == "postgresql":
            self.psql(self.name, *statements, "VACUUM ANALYZE")
        else:
            with contextlib.closing(sqlite3.connect(self.path / "ops.sqlite")) as connection, connection:
                for statement in statements:
                    connection.execute(statement)

    def psql(self, database, *statements):
        where = ["-h", self.server.hostname, "-p", str(self.server.port), "-U", self.server.username, "-d", database]
        commands = [word for statement in statements for word in ("-c", statement)]
        done = subprocess.run(["psql", "-qX", "-v", "ON_ERROR_STOP=1", *where, *commands], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(done.stderr.strip())

    def close(self):
        if self.directory is not None:
            self.directory.cleanup()
            if self.kind == "postgresql":
                self.psql("postgres", f"DROP DATABASE {self.name} WITH (FORCE)")


def rows(transfers, on_postgres):
    """Statements that make the rows. One transfer of a thousand has FAILED; the newest ones wait or run."""

    def label(name, kind):
        return f"CAST({name} AS {kind})" if on_postgres else name

    def numbers(first, last):
        return f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"

    def utc(seconds):
        """A time of the ops-db, this number of seconds ago."""
        if on_postgres:
            return f"now() AT TIME ZONE 'UTC' - ({seconds}) * interval '1 second'"
        return f"datetime('now', (-({seconds})) || ' seconds')"

    def own(seconds):
        """A time of this program's own tables."""
        if on_postgres:
            return f"now() - ({seconds}) * interval '1 second'"
        return f"strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now', (-({seconds})) || ' seconds')"

    running, scheduled, pending = transfers - 2_000, transfers - 1_900, transfers - 1_000
    status = label(
        f"CASE WHEN i > {pending} THEN 'PENDING' WHEN i > {scheduled} THEN 'SCHEDULED' WHEN i > {running} THEN 'IN_PROGRESS'"
        " WHEN i % 1000 = 7 THEN 'FAILED' ELSE 'COMPLETED' END",
        "status",
    )
    here, there = (
        f"(SELECT l.id FROM data_location l JOIN site s ON s.id = l.site_id WHERE s.short_name = '{site}')"
        for site in ("ccat", "cologne")
    )
    every = numbers(1, transfers)
    age = f"({transfers} - i) * 5"
    yield (
        "INSERT INTO data_transfer_package (id, file_name, relative_path, size, status)"
        f" {every} SELECT i, 'night-' || i || '.tar', '2026/night-' || i || '.tar', 5000000000, {label(repr('ARCHIVED'), 'packagestate')}"
        " FROM n"
    )
    yield (
        "INSERT INTO data_transfer (id, data_transfer_package_id, origin_location_id, destination_location_id, status, retry_count,"
        " unpack_status, created_at, start_time, end_time)"
        f" {every} SELECT i, i, {here}, {there}, {status}, 0, {label(repr('PENDING'), 'status')}, {utc(age)},"
        f" CASE WHEN i <= {scheduled} THEN {utc(age)} END, CASE WHEN i <= {running} THEN {utc(age)} END FROM n"
    )
    columns = "(data_transfer_id, attempt, task_id, worker, started_at, ended_at, outcome, error_code, message, bytes, rate_bytes_per_s)"
    outcome = "CASE WHEN i % 1000 = 7 THEN 'failed' ELSE 'completed' END, CASE WHEN i % 1000 = 7 THEN 'origin_missing' END"
    first = max(1, running - OLD - RECENT)
    yield (
        f"INSERT INTO transfer_worker_attempt {columns} {numbers(first, running - RECENT)}"
        f" SELECT i, 1, 'task', 'celery@w', {own('86400 * 40')}, {own('86400 * 31 + i % 800000')}, {outcome}, 'text', 5000000000, 100000000 FROM n"
    )
    yield (
        f"INSERT INTO transfer_worker_attempt {columns} {numbers(running - RECENT + 1, running)}"
        f" SELECT i, 1, 'task', 'celery@w', {own('90000')}, {own('i % 86000')}, {outcome}, 'text', 5000000000, 100000000 FROM n"
    )
    yield (
        "INSERT INTO transfer_worker_delay (data_transfer_id, not_before, retry_count, error_code)"
        f" {numbers(pending + 1, transfers)} SELECT i, {own('-3600')}, 0, 'stalled' FROM n WHERE i % 5 = 0"
    )
    yield (
        "INSERT INTO transfer_worker_schedule (data_transfer_id, scheduled_at, queue, resent)"
        f" {numbers(scheduled + 1, pending)} SELECT i, {own('600')}, 'ccat_buffer_data_transfer', 0 FROM n"
    )
    yield (
        "INSERT INTO transfer_worker_lease (data_transfer_id, token, attempt, task_id, owner_node, owner_host, owner_pid,"
        " owner_pid_scope, owner_started, acquired_at, renewed_at, expires_at, bytes_done, bytes_total, rate_bytes_per_s,"
        f" destination, phase, streams) {numbers(running + 1, scheduled)} SELECT i, 'token-' || i, 1, 'task', 'celery@w', 'w', 1, '', '',"
        f" {own('60')}, {own('1')}, {own('-3600')}, 1000, 5000000000, 1000000, 'there:/' || i, 'copying', 16 FROM n"
    )
    yield "ANALYZE"


def measure(database):
    """Starts the page, and measures each path: the first time, and from the cache."""
    command = [program("ccat-transfer"), "--config", str(database.settings()), "web", "--listen"]
    port = free_port()
    figures = Figures()
    with running([*command, f"127.0.0.1:{port}"], ready="status page open"):
        for name, path in paths(database.transfers).items():
            figures[f"{name}, first"] = ask(port, path)
            figures[f"{name}, cached"] = statistics.median(ask(port, path) for _ in range(CACHED))
    return figures


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ask(port, path):
    """Milliseconds until the whole answer has arrived."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    if answer.status != 200:
        raise Failed(f"{path}: {answer.status} {body[:200]!r}")
    return (time.perf_counter() - began) * 1000


def comparisons(quick):
    transfers = TRANSFERS // 10 if quick else TRANSFERS
    for kind, limit in (("postgresql", 100), ("sqlite", 200)):
        database = Database(kind, transfers)
        yield Comparison(
            f"web-{kind}",
            f"the status page with {transfers} transfers and {RECENT} attempts of the last day",
            {"page": lambda database=database: measure(database)},
            [
                Row(f"{name}, {kind}", "ms", name, "page", target=limit, at_most=True)
                for path in paths(transfers)
                for name in (f"{path}, first", f"{path}, cached")
            ],
            warm_ups=1,
            extra=True,
            close=database.close,
        )
