"""Monitors: `celery inspect`, `celery control` and event receivers see a worker like any other."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery import Celery

from support import MB, TRANSFER, backend_url, clean_environment, events, python_worker, tasks_worker, types, until

BROKERS = ["rabbitmq", "redis"]


def node_of(worker):
    """The node name, from the worker's own log."""
    [ready] = [line for line in worker.log().splitlines() if "worker ready" in line]
    return json.loads(ready)["hostname"]


def celery(broker, *arguments):
    """Celery's own command line; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-b", broker.url, *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_the_command_line(deployment):
    node = node_of(deployment.worker())
    status = celery(deployment.broker, "status")
    assert f"{node}: OK" in status, status
    for command, text in {
        "ping": "pong",
        "registered": TRANSFER,
        "active_queues": deployment.queue,
        "stats": "max-concurrency",
        "conf": "worker_concurrency",
        "report": "ccat-transfer",
        "clock": "clock",
        "active": "- empty -",
        "reserved": "- empty -",
        "scheduled": "- empty -",
        "revoked": "- empty -",
    }.items():
        shown = celery(deployment.broker, "inspect", command, "-d", node)
        assert node in shown and text in shown, shown
    address = urlsplit(deployment.broker.url)
    assert f"{address.hostname}:{address.port}" in celery(deployment.broker, "inspect", "conf", "-d", node)


def test_running_and_waiting_tasks_are_listed(deployment):
    deployment.double(RATE=MB)
    running, waiting = deployment.package(size=8 * MB), deployment.package()
    worker = deployment.worker(concurrency=1)
    node = node_of(worker)
    with deployment.app() as app:
        inspect = app.control.inspect([node])
        first = app.send_task(TRANSFER, [running], queue=deployment.queue)
        deployment.mid_copy()
        [request] = inspect.active()[node]
        assert (request["id"], request["args"], request["type"]) == (first.id, [running], TRANSFER)
        assert request["time_start"] <= time.time() and request["delivery_info"]["routing_key"] == deployment.queue
        assert inspect.query_task(first.id)[node][first.id][0] == "active"

        later = app.send_task(TRANSFER, [waiting], queue=deployment.queue, countdown=600)
        # The only slot is in use, so this waits at the broker.
        until(lambda: not inspect.active()[node], "the first is done", 40)
        until(lambda: inspect.scheduled()[node], "the second waits for its time")
        [scheduled] = inspect.scheduled()[node]
        assert scheduled["request"]["id"] == later.id
        assert inspect.stats()[node]["total"] == {TRANSFER: 1}


def test_revoked(deployment):
    transfer = deployment.package()
    node = node_of(deployment.worker())
    with deployment.app() as app:
        replies = app.control.revoke("11111111-dead", destination=[node], reply=True)
        assert replies == [{node: {"ok": "tasks {'11111111-dead'} flagged as revoked"}}]
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id="11111111-dead")
        until(lambda: result.state == "REVOKED", "the task is revoked")
        assert app.control.inspect([node]).revoked() == {node: ["11111111-dead"]}
    assert deployment.copies() == []


def test_shapes_are_those_of_python(deployment, tmp_path):
    """The same keys as a Python worker's replies."""
    node = node_of(deployment.worker())
    queue = f"{deployment.queue}.peer"
    peer = python_worker(tmp_path, queue, deployment.broker, "rpc://")
    try:
        with deployment.app() as app:
            nodes = lambda: [n for reply in app.control.ping(timeout=2) for n in reply]
            until(lambda: any(n.startswith(f"peer-{queue}") for n in nodes()), "the peer answers")
            [other] = [n for n in nodes() if n.startswith(f"peer-{queue}")]
            inspect = app.control.inspect([node, other], timeout=3)
            stats = inspect.stats()
            assert set(stats[node]) == set(stats[other])
            assert set(stats[node]["broker"]) == set(stats[other]["broker"])
            assert set(stats[node]["rusage"]) == set(stats[other]["rusage"])
            queues = inspect.active_queues()
            assert set(queues[node][0]) == set(queues[other][0])
            assert set(queues[node][0]["exchange"]) == set(queues[other][0]["exchange"])
            for method in ["no_such_command", "enable_events", "enable_events", "disable_events"]:
                replies = app.control.broadcast(method, destination=[node, other], reply=True, timeout=2)
                replies = {name: reply for answer in replies for name, reply in answer.items()}
                assert replies[node] == replies[other], method
    finally:
        peer.stop()
        deployment.broker.delete(queue)


def test_events(deployment):
    good, bad = deployment.package(), deployment.package()
    (deployment.origin / deployment.row(bad)["relative_path"]).unlink()
    worker = deployment.worker()
    node = node_of(worker)
    with deployment.app() as app, events(app) as seen:
        until(lambda: "worker-heartbeat" in types(seen, hostname=node), "the worker is heard of")
        app.control.enable_events(destination=[node], reply=True)
        app.send_task(TRANSFER, [good], queue=deployment.queue, task_id="good").get(timeout=30)
        with pytest.raises(Exception):
            app.send_task(TRANSFER, [bad], queue=deployment.queue, task_id="bad").get(timeout=30)
        until(lambda: "task-failed" in types(seen, uuid="bad"), "the last event has come")
        app.control.shutdown(destination=[node])
        until(lambda: "worker-offline" in types(seen, hostname=node), "the worker says goodbye")
        assert worker.ended() == 0
    order = [name for name in types(seen, uuid="good") if name != "progress-reported"]
    assert order == ["task-received", "task-started", "task-succeeded"]
    assert types(seen, uuid="bad") == ["task-received", "task-started", "task-failed"]
    [failed] = [event for event in seen if event["type"] == "task-failed"]
    assert failed["exception"].startswith("DataTransferError(") and failed["traceback"]
    [received] = [event for event in seen if event["type"] == "task-received" and event["uuid"] == "good"]
    assert (received["name"], received["args"], received["hostname"]) == (TRANSFER, f"[{good}]", node)
    clocks = [event["clock"] for event in seen if event["hostname"] == node]
    assert clocks == sorted(set(clocks))


def test_a_requested_heartbeat_is_complete(deployment):
    node = node_of(deployment.worker())
    with deployment.app() as app, events(app) as seen:
        # The frequency of Python's worker distinguishes it from the regular heartbeats.
        asked = lambda: [event for event in seen if event["type"] == "worker-heartbeat" and event["freq"] == 5]
        app.control.broadcast("heartbeat", destination=[node])
        until(asked, "the heartbeat comes")
        regular = next(event for event in seen if event["type"] == "worker-heartbeat" and event["freq"] != 5)
    [event] = asked()
    assert set(event) == set(regular)
    assert (event["active"], event["processed"], len(event["loadavg"])) == (0, 0, 3)


@pytest.fixture
def silent_server():
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_remote_control_is_never_delayed(tmp_path, broker, silent_server):
    """`ping` and `shutdown` take effect at once after long and huge revocations while the result backend is unreachable."""
    queue = f"control{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    worker = tasks_worker(tmp_path, queue, broker, f"redis://127.0.0.1:{silent_server}/0")
    node = node_of(worker)
    ids = lambda count, length: [f"{n:0{length}}" for n in range(count)]
    requests = {
        "the backend is unreachable": ("revoke", {"task_id": ids(100, 36)}),
        "as many as are remembered": ("revoke", {"task_id": ids(50_000, 36)}),
        "long ids": ("revoke", {"task_id": ids(3_500, 1000)}),
        "longer than a request may be": ("revoke", {"task_id": ids(60_000, 1000)}),
        "many values": ("revoke", {"task_id": [0] * 1_000_000}),
        "stamps": ("revoke_by_stamped_headers", {"headers": {"batch": ids(3_500, 1000)}}),
        "a greeting": ("hello", {"from_node": "celery@peer", "revoked": ids(50_000, 36)}),
        "a pattern": ("query_task", {"ids": ids(50_000, 36)}),
        "a consumer": ("cancel_consumer", {"queue": "a" * 1_000_000}),
    }
    if broker.url.startswith("redis"):
        # Redis ends the connections of subscribers instead of sending it (client-output-buffer-limit).
        del requests["longer than a request may be"]
    with Celery(broker=broker.url, set_as_current=False) as app:
        for what, (method, arguments) in requests.items():
            app.control.broadcast(method, arguments=arguments, destination=[node])
            # It takes less than a second if nothing else runs on the machine.
            assert app.control.ping([node], timeout=5) == [{node: {"ok": "pong"}}], what
        [revoked] = app.control.inspect([node], timeout=5).revoked().values()
        assert sum(map(len, revoked)) <= 2 * MB
        assert revoked[-1] == f"{49_999:036}"
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker.pid}/status").read_text())[1])
        assert peak < 200 * 1024, f"{peak} kB"
        assert len(worker.log()) < MB, "what is long is logged shortened"
        app.control.shutdown(destination=[node])
        assert worker.ended(10) == 0
    broker.delete(queue)


@pytest.mark.rabbitmq
def test_ping_is_answered_once_the_queues_are_consumed(tmp_path, broker):
    """So a client may send to a queue that the worker declares as soon as it has an answer."""
    queues = [f"q{uuid.uuid4().hex[:8]}_data_transfer" for _ in range(8)]
    started = []
    starting = threading.Thread(
        target=lambda: started.append(
            tasks_worker(
                tmp_path, ",".join(queues), broker, backend_url("redis"), task_create_missing_queue_type="quorum"
            )
        )
    )
    with Celery(broker=broker.url, set_as_current=False) as app:
        starting.start()
        try:
            until(lambda: app.control.ping(timeout=0.2), "the worker answers")
            with broker.channel() as channel:
                assert [channel.queue_declare(queue, passive=True).consumer_count for queue in queues] == [1] * 8
        finally:
            starting.join(30)
            for worker in started:
                worker.stop()
            for queue in queues:
                broker.delete(queue)


def test_workers_with_the_same_name_report_it(tmp_path, broker):
    queue = f"names{uuid.uuid4().hex[:8]}_data_transfer"
    broker.declare(queue)
    workers = []
    try:
        for directory in ("one", "two"):
            (tmp_path / directory).mkdir()
            workers.append(tasks_worker(tmp_path / directory, queue, broker, backend_url("redis")))
            if len(workers) == 1:
                # It has received its own greeting and its own events, and recognizes itself.
                with Celery(broker=broker.url, set_as_current=False) as app, events(app) as seen:
                    until(lambda: types(seen, hostname=node_of(workers[0])), "the worker is heard of")
                assert "same node name" not in workers[0].log()
        for worker in workers:
            worker.says("another worker has the same node name")
    finally:
        for worker in workers:
            worker.stop()
        broker.delete(queue)


def test_garbage_is_survived(deployment):
    node = node_of(deployment.worker())
    with deployment.app() as app, app.connection() as connection:
        producer = connection.Producer()
        for body in [b"", b"\xff", b"[]", b"{}", b'{"method": 1}', b'{"method": "revoke", "arguments": []}']:
            producer.publish(
                body, exchange="celery.pidbox", routing_key="", content_type="application/json", content_encoding="utf-8"
            )
        assert app.control.ping([node], timeout=3) == [{node: {"ok": "pong"}}]


def test_terminated_in_mid_copy(deployment, broker):
    """All processes of the copy are stopped; the message is removed, and the row waits for the manager or an operator."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=20 * MB)
    node = node_of(deployment.worker())
    with deployment.app() as app, events(app) as seen:
        app.control.enable_events(destination=[node], reply=True)
        result = app.send_task(TRANSFER, [transfer], queue=deployment.queue)
        deployment.mid_copy()
        replies = app.control.terminate(result.id, destination=[node], reply=True)
        assert replies == [{node: {"ok": f"terminate: {result.id}"}}]
        until(lambda: result.state == "REVOKED", "the task is revoked")
        assert str(result.result) == "terminated"
        until(lambda: "task-revoked" in types(seen, uuid=result.id, terminated=True, signum=15), "the event has come")
        again = app.control.revoke("unknown", terminate=True, destination=[node], reply=True)
        assert again == [{node: {"ok": "terminate: tasks unknown"}}]
    broker.all_settled(deployment.queue)
    deployment.no_bbcp_left(5)
    row = deployment.row(transfer)
    assert (row["status"], row["retry_count"]) == ("PENDING", 0)
    assert deployment.outcomes(transfer) == ["interrupted"]
    [attempt] = deployment.rows("SELECT message FROM transfer_worker_attempt WHERE data_transfer_id = ?", transfer)
    assert "stopped because it was cancelled" in attempt["message"]
    assert deployment.temporary_files() == [] and deployment.leases() == []
