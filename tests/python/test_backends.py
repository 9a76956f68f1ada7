"""Every result backend, beside a Python worker: the clients of each can read the other's results, with the same rows and keys;
and backends that are unreachable for a while.

`OUTAGE_SECONDS` sets the duration of the outage; the default is for CI.
"""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import time
import uuid

import psycopg2
import pytest
import redis
import sqlalchemy
from celery import Celery

from support import EXPIRED, KINDS, Workers, service, tasks_worker, until

pytestmark = pytest.mark.timeout(240)

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "5"))


# ---------------------------------------------------------------- places for results


@contextlib.contextmanager
def postgres_database():
    """A new database: its URL for libpq."""
    name = f"results_{uuid.uuid4().hex[:8]}"
    server = service("TEST_POSTGRES_URL")
    run(server, f"CREATE DATABASE {name}")
    try:
        yield server.rpartition("/")[0] + f"/{name}"
    finally:
        run(server, f"DROP DATABASE {name} WITH (FORCE)")


def run(server, statement):
    connection = psycopg2.connect(server)
    connection.autocommit = True
    try:
        connection.cursor().execute(statement)
    finally:
        connection.close()


@contextlib.contextmanager
def place(kind, directory):
    """(URL, Python's settings, the Rust worker's settings) of a backend."""
    if kind == "postgresql":
        with postgres_database() as url:
            yield url.replace("postgresql://", "db+postgresql+psycopg2://"), {}, {}
    elif kind == "sqlite":
        yield f"db+sqlite:///{directory}/results.sqlite", {}, {}
    else:
        prefix, compression = f"t{uuid.uuid4().hex[:6]}", {"redis": None, "redis gzip": "gzip", "redis bzip2": "bzip2"}[kind]
        python = {"result_backend_transport_options": {"global_keyprefix": prefix}, "result_compression": compression}
        rust = {"result_backend_transport_options__global_keyprefix": prefix, "result_compression": compression or ""}
        yield service("TEST_REDIS_URL"), python, rust


def both(directory, broker, url, python, rust, first):
    """A worker of each kind with the same backend, and settings that store all fields of results."""
    python = python | {"result_extended": True}
    rust = rust | {"result_extended": "true", "task_track_started": "true"}
    return Workers(directory, broker, backend=url, python=python, rust=rust, pool="solo", first=first)


@pytest.fixture(
    params=[
        ("postgresql", "python"),
        ("postgresql", "rust"),
        ("sqlite", "python"),
        ("sqlite", "rust"),
        ("redis", "python"),
        ("redis gzip", "python"),
        ("redis bzip2", "python"),
    ],
    ids=lambda param: f"{param[0]}, {param[1]} first",
    scope="module",
)
def workers(request, tmp_path_factory, broker):
    kind, first = request.param
    directory = tmp_path_factory.mktemp("backends")
    with place(kind, directory) as (url, python, rust):
        workers = both(directory, broker, url, python, rust, first)
        yield workers
        workers.close()


def ended(result, seconds=30):
    until(lambda: result.state in ("SUCCESS", "FAILURE", "REVOKED"), f"{result.id} ends", seconds)
    return result


def meta(result):
    """The meta data that a Python client reads, without values that differ from run to run."""
    stored = dict(result.backend.get_task_meta(result.id))
    value = stored["result"]
    if isinstance(value, BaseException):
        stored["result"] = (type(value).__module__, type(value).__name__, value.args)
    stored["traceback"] = (stored["traceback"] or "").strip().splitlines()[-1:]
    stored["date_done"] = type(stored["date_done"]).__name__
    # A task that was retried is its own parent.
    assert stored.pop("parent_id", stored["task_id"]) == stored["task_id"]
    for own in ("task_id", "worker", "queue"):
        assert stored.pop(own)
    return stored


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize(
    "task, args",
    [
        ("add", [2, 3]),
        ("echo", [{"a": [1, None, 2.5, "é\u2028"]}]),
        ("echo", [None]),
        ("fail", ["it broke", "KeyError"]),
        ("add", [1]),
        ("retry", [1, 0.1]),
    ],
)
def test_a_python_client_sees_the_same(workers, task, args):
    python, rust = (meta(ended(workers.send(kind, task, *args))) for kind in KINDS)
    assert rust == python


def test_started(workers):
    seen = {}
    for kind in KINDS:
        # Without progress, which replaces the meta data that is compared here.
        result = workers.send(kind, "sleep", 3, False)
        until(lambda: result.state == "STARTED", "the task begins")
        seen[kind] = stored = result.backend.get_task_meta(result.id)
        assert set(stored["result"]) == {"pid", "hostname"} and stored["date_done"] is None
        assert result.get(timeout=30) == 3
    assert set(seen["rust"]) == set(seen["python"])


def test_revoked(workers):
    seen = {}
    for kind in KINDS:
        result = workers.send(kind, "add", 1, 1, **EXPIRED)
        seen[kind] = meta(ended(result))
    assert seen["rust"] == seen["python"]


def test_stamps(workers):
    stamps = {"stamped_headers": ["batch"], "batch": ["night 7"]}
    seen = {}
    for kind in KINDS:
        result = ended(workers.send(kind, "add", 1, 1, headers=stamps, **stamps))
        seen[kind] = meta(result)
    assert seen["rust"] == seen["python"]
    assert seen["rust"].get("batch") == ["night 7"]


def test_a_second_run_does_not_replace_a_success(workers):
    for kind in KINDS:
        task_id = str(uuid.uuid4())
        assert ended(workers.send(kind, "add", 1, 1, task_id=task_id)).result == 2
        before = workers.app.backend.get_task_meta(task_id, cache=False)
        workers.send(kind, "fail", "later", task_id=task_id)
        workers.broker.all_settled(workers.queues[kind])
        assert workers.app.backend.get_task_meta(task_id, cache=False) == before


# ---------------------------------------------------------------- tables


def schema(url):
    """The tables, read by SQLAlchemy."""
    engine = sqlalchemy.create_engine(url.removeprefix("db+"))
    inspector = sqlalchemy.inspect(engine)
    found = {}
    for table in sorted(inspector.get_table_names()):
        found[table] = (
            [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in inspector.get_columns(table)],
            sorted((i["name"] or "", tuple(i["column_names"]), i["unique"]) for i in inspector.get_indexes(table)),
            inspector.get_pk_constraint(table),
            inspector.get_unique_constraints(table),
        )
    sequences = sorted(inspector.get_sequence_names()) if engine.dialect.supports_sequences else []
    engine.dispose()
    return found, sequences


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_the_tables_are_celerys(tmp_path, broker, kind):
    made = {}
    for first in KINDS:
        directory = tmp_path / first
        directory.mkdir()
        with place(kind, directory) as (url, python, rust):
            workers = both(directory, broker, url, python, rust, first)
            made[first] = schema(url)
            workers.close()
    assert made["rust"] == made["python"]


OLD = {
    "without the seven": "id INTEGER NOT NULL PRIMARY KEY, task_id VARCHAR(155), status VARCHAR(50), result BYTEA,"
    " date_done TIMESTAMP, traceback TEXT, children BYTEA, UNIQUE (task_id)",
    "without children": "id SERIAL PRIMARY KEY, task_id VARCHAR(155) UNIQUE, status VARCHAR(50), result BYTEA,"
    " date_done TIMESTAMP, traceback TEXT",
}


@pytest.mark.parametrize("old", OLD)
def test_tables_of_old_versions_are_used_unchanged(tmp_path, broker, old):
    with postgres_database() as server:
        if "SERIAL" not in OLD[old]:
            run(server, "CREATE SEQUENCE task_id_sequence")
        run(server, f"CREATE TABLE celery_taskmeta ({OLD[old]})")
        url = server.replace("postgresql://", "db+postgresql://")
        before = schema(server.replace("postgresql://", "postgresql+psycopg2://"))[0]["celery_taskmeta"]
        queue = f"old{uuid.uuid4().hex[:8]}_data_transfer"
        broker.declare(queue)
        worker = tasks_worker(tmp_path, queue, broker, url, result_extended="true")
        app = Celery(broker=broker.url, set_as_current=False)
        try:
            for n in range(3):
                app.send_task("tasks.add", [n, 1], queue=queue, task_id=f"old-{n}")
            broker.all_settled(queue)
            connection = psycopg2.connect(server)
            cursor = connection.cursor()
            cursor.execute("SELECT task_id, status, convert_from(result, 'UTF8') FROM celery_taskmeta ORDER BY task_id")
            assert cursor.fetchall() == [(f"old-{n}", "SUCCESS", str(n + 1)) for n in range(3)]
            connection.close()
            after = schema(server.replace("postgresql://", "postgresql+psycopg2://"))[0]["celery_taskmeta"]
            assert after == before
        finally:
            worker.stop()
            app.close()
            broker.delete(queue)


def test_other_names_and_schemas(tmp_path, broker):
    with postgres_database() as server:
        run(server, "CREATE SCHEMA results")
        queue = f"names{uuid.uuid4().hex[:8]}_data_transfer"
        broker.declare(queue)
        url = server.replace("postgresql://", "db+postgresql+psycopg://")
        names = {"task": "outcomes", "group": "groups"}
        rust = {f"database_table_names__{k}": v for k, v in names.items()}
        rust |= {f"database_table_schemas__{k}": "results" for k in names}
        worker = tasks_worker(tmp_path, queue, broker, url, **rust)
        settings = {"database_table_names": names, "database_table_schemas": dict.fromkeys(names, "results")}
        try:
            # Python's tables are configured once for a process.
            script = (
                "import sys, json; from celery import Celery; app = Celery(broker=sys.argv[1], backend=sys.argv[2]);"
                "app.conf.update(json.loads(sys.argv[3]));"
                "print(app.send_task('tasks.add', [2, 3], queue=sys.argv[4]).get(timeout=30))"
            )
            done = subprocess.run(
                [service("TEST_PYTHON"), "-c", script, broker.url, url, json.dumps(settings), queue],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.stdout.strip() == "5", done.stderr
        finally:
            worker.stop()
            broker.delete(queue)


def test_cleanup(tmp_path, broker):
    path = tmp_path / "results.sqlite"
    url = f"db+sqlite:///{path}"
    queue = f"cleanup{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, url, result_expires="3600")
    app = Celery(broker=broker.url, backend=url, set_as_current=False)
    try:
        old, new = (app.send_task("tasks.add", [n, n], queue=queue) for n in range(2))
        assert (old.get(timeout=30), new.get(timeout=30)) == (0, 2)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute(
                "UPDATE celery_taskmeta SET date_done = '2020-01-01 00:00:00.000000' WHERE task_id = ?", (old.id,)
            )
            connection.commit()
        app.send_task("celery.backend_cleanup", queue=queue).get(timeout=30)
        left = {row[0] for row in rows(path, "SELECT task_id FROM celery_taskmeta")}
        assert new.id in left and old.id not in left
    finally:
        worker.stop()
        app.close()
        broker.delete(queue)


def rows(path, sql):
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        return connection.execute(sql).fetchall()


# ---------------------------------------------------------------- away for a while


class OwnRedis:
    """A Redis that a test may turn off. Every confirmed write is on the disk: a value that is missing afterwards was never
    stored."""

    def __init__(self, directory):
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
            + ["--save", "", "--appendonly", "yes", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self.answers, "Redis answers")

    def answers(self):
        with contextlib.suppress(redis.exceptions.RedisError), redis.Redis.from_url(self.url) as client:
            return client.ping()

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()


def away(tmp_path, broker, url, stop, start, tasks, count, **settings):
    """Sends tasks; the backend becomes unreachable in the middle, and returns."""
    queue = f"away{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, url, "-c", "8", **settings)
    app = Celery(broker=broker.url, set_as_current=False)
    try:
        ids = [f"{queue}-{n}" for n in range(tasks)]
        for n, task_id in enumerate(ids):
            app.send_task("tasks.add", [n, 1], queue=queue, task_id=task_id)
            if n == tasks // 3:
                until(lambda: count() > 0, "some results are stored")
                stop()
        time.sleep(OUTAGE_SECONDS)
        assert broker.unsettled(queue) > 0, "messages wait for their results"
        before = time.monotonic()
        start()
        broker.all_settled(queue)
        tries = worker.log().count("result was not stored")
        print(f"{time.monotonic() - before:.1f} s after the backend's return all is settled; {tries} failed tries")
        # One attempt at a time, and those that ran when the outage began.
        assert tries < 40 + 8 * OUTAGE_SECONDS
        return ids
    finally:
        worker.stop()
        app.close()
        broker.delete(queue)


def test_results_wait_for_redis(tmp_path, broker):
    """A thousand tasks end while Redis is down; all their results are there afterwards."""
    own = OwnRedis(tmp_path)
    own.start()
    try:
        with redis.Redis.from_url(own.url) as client:
            ids = away(tmp_path, broker, own.url, own.stop, own.start, 1000, client.dbsize, task_acks_late="true")
            stored = client.mget(f"celery-task-meta-{task_id}" for task_id in ids)
        results = [json.loads(value)["result"] if value else None for value in stored]
        assert results == [n + 1 for n in range(len(ids))]
    finally:
        own.stop()


def test_results_wait_for_postgresql(tmp_path, broker):
    with postgres_database() as url:
        name, server = url.rpartition("/")[2], service("TEST_POSTGRES_URL")

        def stop():
            run(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            run(server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

        def start():
            run(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

        def results():
            with contextlib.closing(psycopg2.connect(url)) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT task_id, convert_from(result, 'UTF8') FROM celery_taskmeta")
                return dict(cursor.fetchall())

        def count():
            with contextlib.suppress(psycopg2.Error):
                return len(results())
            return 0

        ids = away(
            tmp_path, broker, url.replace("postgresql://", "db+postgresql://"), stop, start, 200, count, task_acks_late="true"
        )
        stored = results()
        assert [stored.get(task_id) for task_id in ids] == [str(n + 1) for n in range(len(ids))]


def test_without_results(tmp_path, broker):
    workers = Workers(tmp_path, broker, backend="disabled://", pool="solo")
    follow_up = f"follow-up{uuid.uuid4().hex[:8]}"
    broker.declare(follow_up)
    try:
        for kind in KINDS:
            workers.send(kind, "echo", kind, link=workers.app.signature("tasks.echo", queue=follow_up))
            body, *_ = until(lambda: broker.get(follow_up), f"the callback of the task in {kind}")
            assert body[0] == [kind]
    finally:
        workers.close()
        broker.delete(follow_up)
