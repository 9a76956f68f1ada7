"""Redis as the broker, beside Python workers: no message is lost, and none is run twice by our worker.

Some tests have a server of their own, which they stop, freeze or fill.
"""

import collections
import contextlib
import json
import os
import signal
import threading
import time

import pytest
import redis

from redis_site import SWEEPING, app_of, is_running, nothing_is_held, options, queue_name, starts
from support import backend_url, python_worker, tasks_worker, until
from test_control import celery, events

pytestmark = pytest.mark.timeout(180)

#: Number of tasks of the test with two workers of each kind.
TASKS = int(os.environ.get("REDIS_TASKS", "2000"))


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
    """It held ten and ran one of them. No Python program is left that would return them."""
    queue = queue_name()
    with app_of(server) as app:
        peer = run(python_worker, queue, server, server.url, "-c", "1", "--prefetch-multiplier", "10", pool="prefork", settings=SWEEPING)
        results = [app.send_task("tasks.sleep", [1], queue=queue) for _ in range(10)]
        until(lambda: server.client.hlen("unacked") == 10 and is_running(results[0]), "the Python worker holds them")
        peer.kill()
        run(tasks_worker, queue, server, server.url, "-c", "10", **options())
        assert [result.get(timeout=20) for result in results] == [1] * 10
    nothing_is_held(server)


def test_messages_of_a_killed_worker_of_ours_are_run_by_python(server, run):
    queue = queue_name()
    with app_of(server) as app:
        worker = run(tasks_worker, queue, server, server.url, **options(task_acks_late="true"))
        result = app.send_task("tasks.sleep", [2], queue=queue)
        until(lambda: is_running(result), "it runs")
        worker.kill()
        run(python_worker, queue, server, server.url, settings=SWEEPING)
        assert result.get(timeout=30) == 2
    nothing_is_held(server)


@pytest.mark.parametrize("busy", [False, True])
def test_a_frozen_worker_loses_nothing(server, run, busy):
    """Messages arrive while the worker is frozen, before and after it has taken some; then it is killed."""
    queue, count = queue_name(), 1000
    with app_of(server) as app:
        killed = run(tasks_worker, queue, server, server.url, "-c", "2", **options())
        if busy:
            app.send_task("tasks.sleep", [60], queue=queue)
            until(lambda: server.ready(queue) == 0, "it is busy")
        results = []
        for n in range(count):
            if n == count // 4:
                killed.signal(signal.SIGSTOP)
            results.append(app.send_task("tasks.add", [n, 1], queue=queue))
        killed.kill()
        other = run(tasks_worker, queue, server, server.url, "-c", "8", **options())
        assert [result.get(timeout=60) for result in results] == [n + 1 for n in range(count)]
        ran = collections.Counter(task for worker in (killed, other) for task in succeeded(worker, "tasks.add"))
        # The killed worker may have run the tasks whose messages it had not settled yet.
        assert set(ran) == {result.id for result in results} and ran.total() <= count + 2, ran.most_common(3)


@pytest.mark.parametrize("kind", [tasks_worker, python_worker])
@pytest.mark.parametrize("task", ["tasks.sleep", "tasks.sleep_early"])
def test_no_message_is_prefetched(server, run, kind, task):
    """With `--disable-prefetch`, a worker takes a message only while a slot is free, over all its queues."""
    queues, slots, count = [queue_name() for _ in range(3)], 2, 12
    waiting = lambda: sum(map(server.ready, queues))
    with app_of(server) as app:
        later = app.send_task("tasks.add", [1, 1], queue=queues[0], countdown=600)
        results = [app.send_task(task, [0.5], queue=queues[n % 3]) for n in range(count)]
        with most_held(server) as most:
            flags = ["-c", slots, "--prefetch-multiplier", 4, "--disable-prefetch"]
            more = {"pool": "threads", "asks": False} if kind is python_worker else {}
            worker = run(kind, ",".join(queues), server, server.url, *flags, **more)
            until(lambda: sum(map(is_running, results)) == slots, "every slot is used", log=worker.log)
            assert waiting() >= count - slots - 2
            assert [result.get(timeout=20) for result in results] == [0.5] * count
        # The one with an eta does not use a slot.
        until(lambda: server.client.hlen("unacked") == 1, "the others are settled")
        assert later.state == "PENDING"
        # Python counts a message only after it is recorded.
        assert most() <= 1 + slots + (kind is python_worker), most()


@contextlib.contextmanager
def most_held(server):
    """A function for the largest number of messages that were held at a time."""
    held, done = [0], threading.Event()

    def look():
        with redis.Redis.from_url(server.url) as client:
            while not done.is_set():
                held.append(client.hlen("unacked"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield lambda: max(held)
    finally:
        done.set()
        looking.join()


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
    with app_of(server, results) as app:
        running = [app.send_task("tasks.sleep", [4], queue=queue) for _ in range(2)]
        waiting = app.send_task("tasks.add", [1, 1], queue=queue)
        until(lambda: all(map(is_running, running)), "they run")
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
        until(lambda: is_running(running), "it runs")
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
    with app_of(server, backend_url("redis")) as app:
        results = [app.send_task("tasks.sleep", [1], queue=queue) for _ in range(6)]
        until(lambda: is_running(results[0]), "the first runs")
        retried = app.send_task("tasks.retry", [1, 0.1], queue=queue)
        server.client.config_set("maxmemory", 1)
        assert [result.get(timeout=30) for result in results] == [1] * 6
        worker.says("nothing is published until the broker has memory again")
        assert not retried.ready()
        with pytest.raises(Exception, match="OOM|maxmemory"):
            app.send_task("tasks.add", [1, 1], queue=queue, retry=False)
        server.client.config_set("maxmemory", 0)
        worker.says("the broker accepts messages again")
        assert retried.get(timeout=20) == 1
    assert worker.running()
    nothing_is_held(server)


def test_a_busy_server_runs_nothing_twice(server, run):
    """It does not answer for longer than the time limit of an answer, and then answers all requests."""
    server.power("stop")
    server.command += ["--enable-debug-command", "local"]
    server.power("start")
    queue = queue_name()
    worker = run(tasks_worker, queue, server, backend_url("redis"), "-c", "4", **options())
    with app_of(server, backend_url("redis")) as app:
        results = [app.send_task("tasks.sleep", [0.2], queue=queue) for _ in range(60)]
        until(lambda: results[0].state != "PENDING", "the first runs")
        with contextlib.suppress(redis.TimeoutError):
            server.client.execute_command("DEBUG", "SLEEP", "7")
        assert [result.get(timeout=60) for result in results] == [0.2] * 60
    assert collections.Counter(succeeded(worker, "tasks.sleep")).total() == 60
    nothing_is_held(server)


def test_workers_of_both_kinds_share_a_queue(server, run, tell):
    queue = queue_name()
    ours = [run(tasks_worker, f"{queue},{queue_name()}", server, server.url, "-c", "4", "--prefetch-multiplier", "4") for _ in range(2)]
    for n in range(2):
        run(python_worker, queue, server, server.url, "-E", "-c", "2", "-n", f"peer{n}-{queue}@%h", pool="prefork")
    with app_of(server) as app, events(app) as seen:
        began = time.monotonic()
        results = [app.send_task("tasks.add", [n, 1], queue=queue) for n in range(TASKS)]
        assert [result.get(timeout=60 + TASKS // 50) for result in results] == [n + 1 for n in range(TASKS)]
        tell(f"{TASKS} tasks at two workers of each kind: {time.monotonic() - began:.1f} s")
        ids = {result.id for result in results}

        def of_kind(kind):
            return [event for event in list(seen) if event["type"] == kind and event.get("uuid") in ids]

        until(lambda: len(of_kind("task-succeeded")) >= len(ids), "all events have come")
        assert set(collections.Counter(event["uuid"] for event in of_kind("task-started")).values()) == {1}
        nodes = {event["hostname"] for event in of_kind("task-succeeded")}
        assert len(nodes) == 4, nodes
    assert all(worker.running() for worker in ours)
    nothing_is_held(server)
    assert server.ready(queue) == 0


def test_a_default_python_client_returns_nothing_of_ours(server, run):
    """An entry looks older than Python's default timeout; it is renewed before a client looks for expired ones."""
    queue = queue_name()
    run(tasks_worker, queue, server, server.url, **options({"visibility_timeout": 4}))
    with app_of(server) as app, events(app) as seen:
        running = app.send_task("tasks.sleep", [8], queue=queue)
        until(lambda: is_running(running), "it runs")
        (field,) = server.client.hkeys("unacked")
        server.client.zadd("unacked_index", {field: time.time() - 4000})
        until(lambda: server.client.zscore("unacked_index", field) > time.time() - 10, "it is renewed")
        assert "pong" in celery(server, "inspect", "ping")
        assert server.client.hkeys("unacked") == [field]
        assert running.get(timeout=20) == 8
        assert starts(seen, running) == 1
    nothing_is_held(server)


def test_a_soft_shutdown(server, run):
    """SIGQUIT with time for running tasks: a short one ends, a long one and one that waits for its time return."""
    queue = queue_name()
    worker = run(tasks_worker, queue, server, server.url, "-c", "2", **options(worker_soft_shutdown_timeout="4"))
    with app_of(server) as app:
        late = app.send_task("tasks.add", [1, 1], queue=queue, countdown=600)
        until(lambda: server.client.hlen("unacked") == 1, "the worker holds the late one")
        short = app.send_task("tasks.sleep", [2], queue=queue)
        long = app.send_task("tasks.sleep", [60], queue=queue)
        until(lambda: is_running(short) and is_running(long), "the others run")
        worker.signal(signal.SIGQUIT)
        assert worker.ended(15) == 0
        assert short.get(timeout=1) == 2
    nothing_is_held(server)
    ids = {message[1]["id"] for message in iter(lambda: server.get(queue), None)}
    assert ids == {long.id, late.id}


def test_queues_are_changed_without_loss(server, run):
    """A queue is consumed and not consumed in turns, while messages arrive."""
    queue, own = queue_name(), queue_name()
    worker = run(tasks_worker, own, server, server.url, "-c", "4", **options())
    with app_of(server) as app:
        results, is_over = [], threading.Event()

        def send():
            while not is_over.wait(0.005):
                results.append(app.send_task("tasks.add", [1, 1], queue=queue))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            for _ in range(5):
                app.control.add_consumer(queue, reply=True, timeout=0.3)
                app.control.cancel_consumer(queue, reply=True, timeout=0.3)
        finally:
            is_over.set()
            sender.join()
        nothing_is_held(server)
        app.control.add_consumer(queue, reply=True, timeout=0.3)
        assert [result.get(timeout=30) for result in results] == [2] * len(results)
        ran = collections.Counter(succeeded(worker, "tasks.add"))
        assert ran.total() == len(results) > 100
    nothing_is_held(server)


PREFETCH = {
    # Concurrency, multiplier: messages that wait and that the worker holds, of 8.
    "1 times 1": ("1", "1", 7, 1),
    "2 times 1": ("2", "1", 6, 2),
    "2 times 2": ("2", "2", 4, 4),
    "no limit": ("1", "0", 0, 8),
}


@pytest.mark.parametrize("case", PREFETCH)
def test_prefetch_limits(server, run, case):
    concurrency, multiplier, waiting, held = PREFETCH[case]
    queue = queue_name()
    with app_of(server) as app:
        for _ in range(8):
            app.send_task("tasks.sleep", [60], queue=queue)
        run(tasks_worker, queue, server, server.url, "-c", concurrency, "--prefetch-multiplier", multiplier)
        count = lambda: (server.ready(queue), server.client.hlen("unacked"))
        until(lambda: count() == (waiting, held), f"{waiting} wait and {held} are held")


def succeeded(worker, task):
    """Ids of the tasks that have succeeded, from the log."""
    return [line["task_id"] for line in lines(worker) if line["message"] == "task succeeded" and line["task"] == task]


def lines(worker):
    return [json.loads(line) for line in worker.log().splitlines() if line.startswith("{")]
