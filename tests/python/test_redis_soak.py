"""Many faults of Redis as the broker at the same time: no task is lost, and our worker runs none twice.

Workers of both kinds share a queue. At random they are killed, their connections are closed, the server does not
answer for some seconds, or it is killed and reads its data again. All random choices come from one seed. REDIS_SOAK_TASKS=20000
makes the test longer, SOAK_SEED sets the seed.
"""

import collections
import contextlib
import json
import os
import random
import re
import threading
import time
import uuid
from datetime import datetime

import pytest
import redis

from brokers import DURABLE, RedisServer
from redis_site import app_of, nothing_is_held, options, queue_name, received
from support import backend_url, python_worker, tasks_worker, until

TASKS = int(os.environ.get("REDIS_SOAK_TASKS", "800"))
SEED = int(os.environ.get("SOAK_SEED", "7"))
#: Tasks that are sent between two faults.
PACE = 40

pytestmark = pytest.mark.timeout(180 + TASKS // 5)

#: Longer than the server is away, so that no program takes over a message whose worker lives.
TRANSPORT = {"visibility_timeout": 8, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}

#: Publishes a message once, however often it is called.
PUBLISH = "if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('LPUSH', KEYS[2], ARGV[2]) end"


class Soak:
    def __init__(self, directory, server):
        self.directory, self.server, self.queue = directory, server, queue_name()
        self.chance, self.done = random.Random(SEED), collections.Counter()
        self.lives, self.killed, self.ids = [], {}, []
        self.workers = [(kind, self.born(kind)) for kind in ("rust", "rust", "python")]

    def born(self, kind):
        directory = self.directory / f"life{len(self.lives)}"
        directory.mkdir()
        place = (directory, self.queue, self.server, backend_url("redis"))
        if kind == "rust":
            worker = tasks_worker(*place, "-c", "4", "--prefetch-multiplier", "2", **options(TRANSPORT))
        else:
            settings = {"broker_transport_options": TRANSPORT}
            worker = python_worker(*place, "-c", "2", "-n", f"p{len(self.lives)}@%h", pool="prefork", settings=settings, asks=False)
        self.lives.append((kind, worker))
        return worker

    def publish(self, text, task_id):
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
                return self.server.client.eval(PUBLISH, 2, "sent", self.queue, task_id, text)
            time.sleep(0.05)

    def send(self):
        for n in range(TASKS):
            task_id = str(uuid.uuid4())
            self.ids.append(task_id)
            self.publish(message(self.queue, task_id, self.chance.choice([0.01, 0.05, 0.2])), task_id)
            time.sleep(0.01)

    def fault(self):
        kind = self.chance.choices(["kill rust", "kill python", "connections", "sleep", "restart"], [4, 2, 3, 2, 2])[0]
        self.done[kind] += 1
        if kind.startswith("kill"):
            number = self.chance.choice([n for n, (worker_kind, _) in enumerate(self.workers) if worker_kind in kind])
            worker = self.workers[number][1]
            worker.kill()
            self.killed[worker] = time.time()
        elif kind == "connections":
            for client in self.server.client.client_list():
                if self.chance.random() < 0.5:
                    self.server.client.client_kill_filter(_id=client["id"], skipme=True)
        elif kind == "sleep":
            with contextlib.suppress(redis.ConnectionError):
                self.server.client.execute_command("DEBUG", "SLEEP", "2")
        else:
            self.server.process.kill()
            self.server.start()
        self.mend()

    def mend(self):
        """Replaces dead workers; one of Python's dies if the server is away while it holds messages."""
        for number, (kind, worker) in enumerate(self.workers):
            if not worker.running():
                assert kind == "python" or worker in self.killed, worker.log()[-3000:]
                self.workers[number] = kind, self.born(kind)

    def close(self):
        for _, worker in self.lives:
            worker.kill()


def message(queue, task_id, seconds):
    return json.dumps(
        {
            "body": json.dumps([[seconds], {}, {}]),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"lang": "py", "task": "tasks.sleep", "id": task_id},
            "properties": {
                "body_encoding": "utf-8",
                "correlation_id": task_id,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def test_soak(tmp_path, tell):
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis", *DURABLE, "--enable-debug-command", "local")
    soak = None
    try:
        soak = Soak(tmp_path, server)
        play(soak, tell)
    finally:
        if soak:
            soak.close()
        server.stop()


def play(soak, tell):
    server, began = soak.server, time.monotonic()
    sender = threading.Thread(target=soak.send)
    sender.start()
    while sender.is_alive():
        count = len(soak.ids)
        until(lambda: len(soak.ids) >= count + PACE or not sender.is_alive(), "more tasks are sent", 60)
        soak.fault()
    soak.mend()
    with app_of(server, backend_url("redis")) as app:
        missing = set(soak.ids)

        def all_done():
            soak.mend()
            missing.difference_update([task for task in missing if app.AsyncResult(task).state == "SUCCESS"])
            return not missing

        with contextlib.suppress(AssertionError):
            until(all_done, "all are done", 60 + TASKS // 20)
    nothing_is_held(server)
    assert server.ready(soak.queue) == server.parked(soak.queue) == 0
    ours, theirs = runs(soak)
    # A Python worker takes a message and records it by two commands: one that is killed in between loses it.
    kills = sum(kind == "python" and worker in soak.killed for kind, worker in soak.lives)
    touched = missing & received_by_us(soak)
    assert not touched and len(missing) <= kills, f"{len(missing)} of {TASKS} are lost, seed {SEED}, of these by us: {touched}"
    again = {
        task: ended
        for task, ended in ours.items()
        if task not in theirs
        # A worker that is killed a moment after a task has ended has not acknowledged it.
        and sum(not 0 <= soak.killed.get(worker, 0) - at < 2 for worker, at in ended) > 1
    }
    faults = ", ".join(f"{count} × {what}" for what, count in soak.done.most_common())
    tell(f"Redis soak: seed {SEED}, {TASKS} tasks, {time.monotonic() - began:.0f} s; {len(ours)} run by us, {len(theirs)} by Python; {len(missing)} lost by a killed Python worker; {faults}")
    assert not again, f"{len(again)} run twice by our workers, seed {SEED}: {again}"
    assert len(soak.done) > 3 and ours and theirs


def received_by_us(soak):
    return set().union(*(received(worker) for kind, worker in soak.lives if kind == "rust"))


def runs(soak):
    """The ends of each task at workers of ours, as (worker, time), and the tasks that workers of Python received."""
    ours, theirs = collections.defaultdict(list), set()
    for kind, worker in soak.lives:
        if kind == "python":
            theirs.update(re.findall(r"Task tasks\.sleep\[([0-9a-f-]+)\] received", worker.log()))
            continue
        for line in worker.log().splitlines():
            if '"task succeeded"' in line:
                event = json.loads(line)
                at = datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00")).timestamp()
                ours[event["task_id"]].append((worker, at))
    return ours, theirs
