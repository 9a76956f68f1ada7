"""A classic, a quorum and a priority queue on one worker, and the broker restarted under load: nothing lost, every task's
effect once, memory flat. Redis has one kind of queue.

`LOAD_TASKS` sets the number of tasks; the default is for CI.
"""

import os
import threading
import uuid

import pytest
from celery import Celery
from kombu import Exchange, Queue

from support import backend_url, tasks_worker, until

pytestmark = pytest.mark.timeout(180)

BROKERS = ["rabbitmq", "own-redis"]

TASKS = int(os.environ.get("LOAD_TASKS", "1500"))


@pytest.fixture
def queues(broker):
    tag = uuid.uuid4().hex[:8]
    declared = {
        f"classic{tag}": {},
        f"quorum{tag}": {"x-queue-type": "quorum"},
        f"priority{tag}": {"x-max-priority": 10},
    }
    with broker.channel() as channel:
        for name, arguments in declared.items():
            channel.exchange_declare(name, "direct", durable=True, auto_delete=False)
            channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
            channel.queue_bind(name, name, name)
    yield declared
    for name in declared:
        broker.delete(name)


def resident_mb(pid):
    with open(f"/proc/{pid}/status") as status:
        [line] = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def publish(app, queues, numbers):
    """Sends tasks with confirms while the broker restarts: an unconfirmed message is sent again, with
    the same id."""
    for number in numbers:
        app.send_task(
            "tasks.add",
            [number, 1],
            queue=queues[number % len(queues)],
            task_id=f"{queues[0]}-{number}",
            priority=number % 10,
            retry=True,
            retry_policy={"max_retries": 300, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5},
        )


# lapin's buffers of one connection, which become resident as they are used; the allocator keeps those of the
# connection before the restart.
BUFFERS_MB = 2 * 32 * (128 << 10) / 1e6


def test_a_restart_under_load(tmp_path, broker, queues):
    app = Celery(broker=broker.url, backend=backend_url("redis"), set_as_current=False)
    app.conf.broker_transport_options = {"confirm_publish": True}
    app.conf.task_queues = [
        Queue(name, Exchange(name), routing_key=name, queue_arguments=arguments) for name, arguments in queues.items()
    ]
    queues = list(queues)
    worker = tasks_worker(tmp_path, ",".join(queues), broker, backend_url("redis"), "-c", "8")
    try:
        publish(app, queues, range(100))
        done = lambda numbers: [app.AsyncResult(f"{queues[0]}-{n}").state == "SUCCESS" for n in numbers]
        until(lambda: all(done(range(100))), "the first are done", 60)
        before = resident_mb(worker.pid)

        sender = threading.Thread(target=publish, args=[app, queues, range(100, TASKS)])
        sender.start()
        until(lambda: any(done(range(TASKS // 4, TASKS // 4 + 20))), "a quarter is done", 120)
        broker.power("restart")
        sender.join(240)
        assert not sender.is_alive()
        try:
            until(lambda: all(done(range(TASKS))), "all are done", 60)
        except AssertionError:
            missing = [n for n, is_done in enumerate(done(range(TASKS))) if not is_done]
            waiting = {queue: broker.unsettled(queue) for queue in queues}
            raise AssertionError(f"{len(missing)} are missing: {missing[:20]}; unsettled: {waiting}\n{worker.log()[-1500:]}") from None

        for number in range(TASKS):
            assert app.AsyncResult(f"{queues[0]}-{number}").result == number + 1
        broker.all_settled(*queues)
        after = resident_mb(worker.pid)
        assert worker.running()
        most = before + 2 * BUFFERS_MB + 8
        assert after < most, f"{before:.1f} MB before, {after:.1f} MB after {TASKS} tasks"
        print(f"\n{TASKS} tasks over three kinds of queues and a restart: {before:.1f} MB before, {after:.1f} MB after")
    finally:
        worker.stop()
        app.close()
