"""Redis as the broker, beside Python workers: no message is lost, and none is run twice by our worker.

Some tests have a server of their own, which they stop, freeze or fill.
"""

import collections
import contextlib
import json
import signal
import socket
import subprocess
import uuid

import pytest
import redis
from celery import Celery

from support import TRANSFER, Process, RedisBroker, backend_url, python_worker, tasks_worker, until
from test_control import events

pytestmark = pytest.mark.timeout(180)

BROKERS = ["redis"]

#: Options of Python for workers that return messages of others after three seconds.
SWEEPING = {"broker_transport_options": RedisBroker.transport_options}


def options(**more):
    """Keys of [celery] for a worker whose messages return after three seconds."""
    return {f"broker_transport_options__{k}": v for k, v in RedisBroker.transport_options.items()} | more


class Server(RedisBroker):
    """A Redis server of one test."""

    def __init__(self, directory, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.directory, self.url = directory, f"redis://127.0.0.1:{self.port}/0"
        self.command = ["redis-server", "--port", self.port, "--dir", directory, "--save", "", *arguments]
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def start(self):
        self.process = Process(self.command, self.directory / "redis.log")
        until(self.answers, "Redis answers", log=self.process.log)

    def answers(self):
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            return self.client.ping()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "redis").mkdir()
    server = Server(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.process.signal(signal.SIGCONT)
    server.process.stop()


@pytest.fixture
def run(tmp_path):
    """Starts workers, which end with the test."""
    processes = []

    def run(start, *arguments, **more):
        directory = tmp_path / f"worker{len(processes)}"
        directory.mkdir()
        processes.append(start(directory, *arguments, **more))
        return processes[-1]

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGCONT)
        process.kill()


@contextlib.contextmanager
def app_of(broker):
    with Celery(broker=broker.url, backend=broker.url, set_as_current=False) as app:
        yield app


def starts(seen, result):
    return sum(event["type"] == "task-started" and event.get("uuid") == result.id for event in seen)


def queue_name():
    return f"r{uuid.uuid4().hex[:8]}"


def nothing_is_held(broker):
    until(lambda: (broker.client.hlen("unacked"), broker.client.zcard("unacked_index")) == (0, 0), "nothing is held")


def test_a_long_task_and_a_late_one_start_once(server, run):
    """Both take three times the visibility timeout, while a Python worker looks for expired messages all the time."""
    queue = queue_name()
    run(tasks_worker, queue, server, server.url, "-c", "1", **options(task_acks_late="true"))
    run(python_worker, queue_name(), server, server.url, settings=SWEEPING)
    with app_of(server) as app, events(app) as seen:
        late = app.send_task("tasks.add", [1, 1], queue=queue, countdown=9)
        long = app.send_task("tasks.sleep", [9], queue=queue)
        assert long.get(timeout=30) == 9
        assert late.get(timeout=30) == 2
        until(lambda: starts(seen, late), "the events have come")
        assert (starts(seen, long), starts(seen, late)) == (1, 1)
    nothing_is_held(server)


def test_messages_of_a_killed_python_worker_are_run(server, run):
    """No Python program is left that would return them."""
    queue = queue_name()
    with app_of(server) as app:
        peer = run(python_worker, queue, server, server.url, settings=SWEEPING)
        result = app.send_task("tasks.sleep", [1], queue=queue)
        until(lambda: server.client.hlen("unacked"), "the Python worker holds it")
        peer.kill()
        run(tasks_worker, queue, server, server.url, **options())
        assert result.get(timeout=20) == 1
    nothing_is_held(server)


def test_messages_of_a_killed_worker_of_ours_are_run_by_python(server, run):
    queue = queue_name()
    with app_of(server) as app:
        worker = run(tasks_worker, queue, server, server.url, **options(task_acks_late="true"))
        result = app.send_task("tasks.sleep", [2], queue=queue)
        until(lambda: result.state in ("STARTED", "PROGRESS"), "it runs")
        worker.kill()
        run(python_worker, queue, server, server.url, settings=SWEEPING)
        assert result.get(timeout=30) == 2
    nothing_is_held(server)


@pytest.mark.parametrize("busy", [False, True])
def test_a_frozen_worker_loses_nothing(server, run, busy):
    """Messages arrive while the worker is frozen; it is killed before it has seen them."""
    queue = queue_name()
    with app_of(server) as app:
        worker = run(tasks_worker, queue, server, server.url, "-c", "2", **options())
        if busy:
            app.send_task("tasks.sleep", [60], queue=queue)
            until(lambda: server.ready(queue) == 0, "it is busy")
        worker.signal(signal.SIGSTOP)
        results = [app.send_task("tasks.add", [n, 1], queue=queue) for n in range(200)]
        worker.kill()
        run(tasks_worker, queue, server, server.url, "-c", "8", **options())
        assert [result.get(timeout=60) for result in results] == [n + 1 for n in range(200)]


def test_killed_connections_are_opened_again(server, run):
    queue = queue_name()
    worker = run(tasks_worker, queue, server, server.url, "-c", "4")
    with app_of(server) as app, events(app) as seen:
        running = app.send_task("tasks.sleep", [3], queue=queue)
        until(lambda: starts(seen, running), "it runs")
        for client in server.client.client_list():
            if client["name"].startswith("tasks"):
                server.client.client_kill_filter(_id=client["id"])
        results = [app.send_task("tasks.add", [n, 1], queue=queue) for n in range(20)]
        assert [result.get(timeout=10) for result in results] == [n + 1 for n in range(20)]
        assert app.control.ping(timeout=2), "remote control works again"
        assert running.get(timeout=10) == 3
        assert starts(seen, running) == 1
        assert worker.running()
    nothing_is_held(server)


def test_a_restarted_server_has_the_held_messages(server, run):
    queue = queue_name()
    results = backend_url("redis")
    worker = run(tasks_worker, queue, server, results, "-c", "2", **options(task_acks_late="true"))
    with Celery(broker=server.url, backend=results, set_as_current=False) as app:
        running = [app.send_task("tasks.sleep", [4], queue=queue) for _ in range(2)]
        waiting = app.send_task("tasks.add", [1, 1], queue=queue)
        until(lambda: all(result.state in ("STARTED", "PROGRESS") for result in running), "they run")
        server.process.kill()
        server.start()
        assert [result.get(timeout=30) for result in running] == [4, 4]
        assert waiting.get(timeout=30) == 2
    assert worker.log().count('"task received"') == 3
    nothing_is_held(server)


def test_a_frozen_server_is_noticed(server, run):
    queue = queue_name()
    worker = run(tasks_worker, queue, server, server.url, "-c", "2")
    with app_of(server) as app:
        running = app.send_task("tasks.sleep", [5], queue=queue)
        until(lambda: running.state in ("STARTED", "PROGRESS"), "it runs")
        server.process.signal(signal.SIGSTOP)
        worker.says("no connection to the broker", 30)
        server.process.signal(signal.SIGCONT)
        assert running.get(timeout=30) == 5
        assert app.send_task("tasks.add", [1, 1], queue=queue).get(timeout=20) == 2
    nothing_is_held(server)


def test_a_full_server_loses_nothing(server, run):
    """Acknowledgements work, publishing waits, and what waited is run."""
    queue = queue_name()
    worker = run(tasks_worker, queue, server, backend_url("redis"), "-c", "2")
    with Celery(broker=server.url, backend=backend_url("redis"), set_as_current=False) as app:
        results = [app.send_task("tasks.sleep", [1], queue=queue) for _ in range(6)]
        until(lambda: results[0].state in ("STARTED", "PROGRESS"), "the first runs")
        server.client.config_set("maxmemory", 1)
        assert [result.get(timeout=30) for result in results] == [1] * 6
        server.client.config_set("maxmemory", 0)
        assert app.send_task("tasks.add", [1, 1], queue=queue).get(timeout=20) == 2
    assert worker.running()
    nothing_is_held(server)


def test_workers_of_both_kinds_share_a_queue(server, run):
    queue = queue_name()
    names = [queue_name() for _ in range(2)]
    for name in names:
        run(tasks_worker, f"{queue},{name}", server, server.url, "-c", "4", "--prefetch-multiplier", "4")
    run(python_worker, queue, server, server.url, "-E", "-c", "2", pool="prefork")
    with app_of(server) as app, events(app) as seen:
        results = [app.send_task("tasks.add", [n, 1], queue=queue) for n in range(1000)]
        assert [result.get(timeout=60) for result in results] == [n + 1 for n in range(1000)]
        ids = {result.id for result in results}

        def of_kind(kind):
            return [event for event in seen if event["type"] == kind and event.get("uuid") in ids]

        until(lambda: len(of_kind("task-succeeded")) >= len(ids), "all events have come")
        assert set(collections.Counter(event["uuid"] for event in of_kind("task-started")).values()) == {1}
        nodes = {event["hostname"] for event in of_kind("task-succeeded")}
        assert len(nodes) == 3, nodes
    nothing_is_held(server)


def test_what_is_no_message_is_kept_for_an_operator(deployment, broker):
    """It stops no worker; `ccat-transfer parked` shows it, returns it to the queue, and deletes it."""
    deployment.worker()
    for element in ("garbage", "[]", '{"body": ""}'):
        broker.client.lpush(deployment.queue, element)
    transfer = deployment.package()
    with deployment.app() as app:
        assert app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30) is None
    parked = lambda *arguments: json.loads(deployment.cli("--json", "parked", *arguments, deployment.queue))
    assert [element["text"] for element in parked("list")] == ["garbage", "[]", '{"body": ""}']
    assert "garbage" in deployment.cli("parked", "list", deployment.queue)
    assert parked("requeue")["elements"] == 3
    until(lambda: len(parked("list")) == 3, "the worker has parked them again")
    assert parked("delete")["elements"] == 3
    assert parked("list") == []
    nothing_is_held(broker)


def test_certificates_are_verified(tmp_path, run):
    """By default, and with an authority of our own; without verification only if the URL says so."""
    directory = tmp_path / "tls"
    directory.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = ["--tls-port", port, "--tls-cert-file", directory / "cert.pem", "--tls-key-file", directory / "key.pem"]
    server = Server(directory, *tls, "--tls-auth-clients", "no")
    try:
        base = f"rediss://localhost:{port}/0"
        for url, is_trusted in {
            f"{base}?ssl_cert_reqs=none": True,
            f"{base}?ssl_ca_certs={directory}/cert.pem": True,
            base: False,
        }.items():
            server.url = url
            queue = queue_name()
            if is_trusted:
                log = run(tasks_worker, queue, server, "").log()
                assert ("certificate is not verified" in log) == ("none" in url)
                continue
            with pytest.raises(AssertionError, match="(?s)ended early.*certificate"):
                run(tasks_worker, queue, server, "", broker_connection_retry_on_startup="false")
    finally:
        server.process.stop()
