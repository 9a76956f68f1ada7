"""Comparisons by Celery tasks that do nothing: our worker, Python's, and a bare loop on the same broker."""

import contextlib
import itertools
import json
import os
import subprocess
import time

from .sides import Comparison, Failed, Figures, Row, REPO, bench, broker_uri, channel, program, resident_mb, running

NUMBERS = itertools.count(1)


def broker_version():
    with channel() as open_channel:
        return open_channel.connection.server_properties.get("version", "?")


def names():
    name = f"bench{next(NUMBERS)}"
    return name, f"{name}.replies"


def delete(queue, replies):
    with channel() as open_channel:
        for name in (queue, replies):
            open_channel.queue_delete(name)
        open_channel.exchange_delete(queue)


def celery(backend):
    return {"CELERY_BROKER_URL": os.environ["TEST_AMQP_URL"], "CELERY_RESULT_BACKEND": backend}


def rust(queue, concurrency, multiplier, backend="rpc://", events=False, level="WARNING"):
    """Our worker with a task that does nothing: late acknowledgement, confirmed results."""
    command = [program("ccat-bench"), "worker", "-Q", queue, "-c", str(concurrency), "-l", level]
    command += ["--prefetch-multiplier", str(multiplier), *(["-E"] if events else [])]
    return command, {**celery(backend), "CCAT_DATA_TRANSFER_CELERY__TASK_TRACK_STARTED": "false"}


def before(queue, *arguments, **options):
    """Our worker of another build."""
    [_, *flags], environment = rust(queue, *arguments, **options)
    return [os.path.join(os.environ["BENCH_BEFORE"], "ccat-bench"), *flags], environment


def python(queue, concurrency, multiplier, backend="rpc://", events=False, level="WARNING"):
    """The same tasks in Python Celery's prefork pool, without the wait for other workers at its start."""
    command = [os.environ["TEST_PYTHON"], "-m", "celery", "-A", "peer", "worker", "-Q", queue, "-c", str(concurrency)]
    command += ["-l", level, "--without-mingle", "--without-gossip", *(["-E"] if events else [])]
    settings = {"worker_prefetch_multiplier": multiplier, "task_acks_late": True, "task_track_started": False}
    path = {"PYTHONPATH": str(REPO / "tests/python"), "PEER_SETTINGS": json.dumps(settings)}
    return command, {**celery(backend), **path}


def redis():
    return os.environ["TEST_REDIS_URL"]


def throughput(worker, count, *arguments, backend="rpc://", events=False, **more):
    """Tasks per second from a full queue, from the first tenth of them to the last one."""

    def measure():
        queue, replies = names()
        is_redis = backend == "redis"
        where = redis() if is_redis else backend
        if is_redis:
            subprocess.run(["redis-cli", "-u", redis(), "flushall"], check=True, capture_output=True)
        bench("fill", "--queue", queue, "--reply-to", replies, "--count", count)
        with channel() as open_channel:
            if events:
                open_channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
                open_channel.queue_declare(f"{queue}.events", durable=False, auto_delete=False)
                open_channel.queue_bind(f"{queue}.events", "celeryev", "#")
            try:
                with running(*worker(queue, *arguments, backend=where, events=events, **more)) as process:
                    counted = ["--queue", queue, "--empties"] if is_redis else ["--queue", replies]
                    figures = bench("watch", *counted, "--count", count, "--pid", process.pid)
                    if is_redis:
                        await_results(count)
                    if events:
                        figures["events_lost"] = 3 * count - task_events(open_channel, f"{queue}.events")
                        if figures["events_lost"]:
                            raise Failed(f"{figures['events_lost']} events of tasks are missing")
            finally:
                open_channel.queue_delete(f"{queue}.events")
                delete(queue, replies)
        return figures

    return measure


def await_results(count):
    """The queue is empty when the last tasks begin; their results have to arrive as well."""
    deadline = time.monotonic() + 10
    while True:
        done = subprocess.run(["redis-cli", "-u", redis(), "dbsize"], check=True, capture_output=True, text=True)
        if int(done.stdout) >= count:
            return
        if time.monotonic() > deadline:
            raise Failed(f"{done.stdout.strip()} of {count} results")
        time.sleep(0.1)


def task_events(open_channel, queue):
    """Number of task events in a queue."""
    found = 0

    def take(message):
        nonlocal found
        events = json.loads(message.body)
        found += sum(event["type"].startswith("task-") for event in (events if isinstance(events, list) else [events]))

    consumer = open_channel.basic_consume(queue, no_ack=True, callback=take)
    with contextlib.suppress(TimeoutError):  # no further message arrives
        while True:
            open_channel.connection.drain_events(timeout=0.5)
    open_channel.basic_cancel(consumer)
    return found


def loop(queue, concurrency, multiplier, count=10_000_000):
    """Command of a bare lapin loop that replaces a worker, on an existing queue."""
    command = [program("ccat-bench"), "--broker", broker_uri(), "drain", "--queue", queue, "--count", str(count)]
    return [*command, "--prefetch", str(concurrency * multiplier), "--concurrency", str(concurrency), "--linger"], {}


def bare_loop(count, prefetch):
    """Maximum rate of the broker and lapin."""

    def measure():
        queue, replies = names()
        bench("fill", "--queue", queue, "--reply-to", replies, "--count", count)
        try:
            with running(*loop(queue, prefetch, 1, count)) as process:
                return bench("watch", "--queue", replies, "--count", count, "--pid", process.pid)
        finally:
            delete(queue, replies)

    return measure


def latency(worker, seconds):
    """Time from publish to result at 100 tasks a second."""

    def measure():
        queue, replies = names()
        command, environment = worker(queue, 2, 4)
        try:
            if worker is loop:  # the loop does not declare its queue
                bench("fill", "--queue", queue, "--reply-to", replies, "--count", 0)
            with running(command, environment):
                return bench("latency", "--queue", queue, "--reply-to", replies, "--rate", 100, "--seconds", seconds)
        finally:
            delete(queue, replies)

    return measure


def start(worker):
    """Time from the start of the process to the result of a waiting task."""

    def measure():
        queue, replies = names()
        bench("fill", "--queue", queue, "--reply-to", replies, "--count", 1)
        try:
            began = time.monotonic()
            with running(*worker(queue, 2, 4)), channel() as open_channel:
                while open_channel.queue_declare(replies, passive=True).message_count < 1:
                    if time.monotonic() - began > 30:
                        raise Failed("no result after 30 s")
                    time.sleep(0.002)
                return Figures(seconds=time.monotonic() - began)
        finally:
            delete(queue, replies)

    return measure


def memory(count, worker=rust):
    """Resident memory of a worker of ours: idle, and after a tenth and after all of `count` tasks."""

    def measure():
        queue, replies = names()
        # No client reads the results; they must not fill the broker.
        with channel() as open_channel:
            open_channel.queue_declare(replies, durable=True, auto_delete=False)
        bench("fill", "--queue", queue, "--reply-to", "", "--count", 1)
        figures = Figures()
        try:
            command, environment = worker(queue, 64, 2, level="INFO")
            with running(command, environment, ready="worker ready") as process:
                time.sleep(2)
                figures["idle_mb"] = resident_mb(process.pid)
                for share, name in ((0.1, "tenth_mb"), (1.0, "all_mb")):
                    left = int(count * share) - figures.get("tasks", 0)
                    while left > 0:
                        part = min(left, 50_000)
                        bench("fill", "--queue", queue, "--reply-to", "", "--count", part)
                        bench("watch", "--queue", queue, "--empties", "--count", part)
                        left -= part
                        figures["tasks"] = figures.get("tasks", 0) + part
                    time.sleep(1)
                    figures[name] = resident_mb(process.pid)
        finally:
            delete(queue, replies)
        figures["growth"] = figures["all_mb"] / figures["tenth_mb"]
        return figures

    return measure


def comparisons(quick):
    """All comparisons of this module. Python gets fewer tasks, so that its runs take about the same time."""
    ours, theirs, limit = (8_000, 1_500, 10_000) if quick else (12_000, 1_500, 15_000)
    few = (3_000, 4_000) if quick else (4_000, 5_500)
    return [
        Comparison(
            "rpc",
            "no-op tasks, rpc://, -c 64 and prefetch 128 against prefork -c 2, and against a bare lapin loop",
            {
                "ccat-transfer": throughput(rust, ours, 64, 2),
                "python": throughput(python, theirs, 2, 4),
                "lapin loop": bare_loop(limit, 128),
            },
            [
                Row("tasks, rpc://, against Python", "1/s", "per_second", "ccat-transfer", "python", target=8, stretch=12),
                Row("tasks, rpc://, against the bare loop", "1/s", "per_second", "ccat-transfer", "lapin loop", target=0.6, stretch=0.8),
                Row("CPU for 1,000 tasks, Python's ÷ ours", "s", "cpu_s_per_1000", "ccat-transfer", "python", inverted=True, target=10, stretch=15),
            ],
        ),
        Comparison(
            "small",
            "the same at prefetch 4",
            {"ccat-transfer": throughput(rust, few[0], 4, 1), "lapin loop": bare_loop(few[1], 4)},
            [Row("tasks at prefetch 4, against the bare loop", "1/s", "per_second", "ccat-transfer", "lapin loop", target=0.6, stretch=0.8)],
        ),
        Comparison(
            "redis",
            "no-op tasks, redis://, -c 64 against prefork -c 2",
            {
                "ccat-transfer": throughput(rust, ours, 64, 2, backend="redis"),
                "python": throughput(python, theirs, 2, 4, backend="redis"),
            },
            [Row("tasks, redis://, against Python", "1/s", "per_second", "ccat-transfer", "python")],
        ),
        Comparison(
            "events",
            "no-op tasks, rpc://, with events and -l INFO; none of the events may be lost",
            {
                "ccat-transfer": throughput(rust, ours, 64, 2, events=True, level="INFO"),
                "python": throughput(python, theirs, 2, 4, events=True, level="INFO"),
            },
            [Row("tasks with events, against Python -E", "1/s", "per_second", "ccat-transfer", "python", target=8, stretch=12)],
        ),
        Comparison(
            "latency",
            "from publish to result at 100 tasks a second",
            {name: latency(worker, 2) for name, worker in {"ccat-transfer": rust, "python": python, "lapin loop": loop}.items()},
            [
                Row("publish to done, median", "ms", "median_ms", "ccat-transfer", "python", target=0.6, stretch=0.4, at_most=True),
                Row("publish to done, p99", "ms", "p99_ms", "ccat-transfer", "python", target=0.6, stretch=0.4, at_most=True),
                Row("publish to done, p99, a bare lapin loop against Python", "ms", "p99_ms", "lapin loop", "python", at_most=True),
            ],
            warm_ups=0,
        ),
        Comparison(
            "start",
            "from the start of the process to the first result",
            {"ccat-transfer": start(rust), "python": start(python)},
            [Row("start to first task done", "s", "seconds", "ccat-transfer", "python", target=0.25, stretch=0.1, at_most=True)],
        ),
        Comparison(
            "memory",
            f"resident memory, idle and over {'100,000' if quick else '1,000,000'} tasks with -l INFO",
            {"ccat-transfer": memory(100_000 if quick else 1_000_000)},
            [
                Row("resident after all tasks", "MB", "all_mb", "ccat-transfer", target=40, stretch=28, at_most=True),
                Row("resident after all ÷ after a tenth of them", "", "growth", "ccat-transfer", target=None if quick else 1.05, at_most=True),
            ],
            warm_ups=0,
            pairs=1,
        ),
    ]


def against_before(quick):
    """Our worker against that of another build: rates, CPU, start and idle memory may differ by three per cent."""
    count = 8_000 if quick else 12_000

    def sides(measure):
        return {"now": measure(rust), "before": measure(before)}

    def rate(title):
        return Row(f"{title}, now ÷ before", "1/s", "per_second", "now", "before", target=0.97)

    def cpu(title):
        return Row(f"CPU for 1,000 {title}, now ÷ before", "s", "cpu_s_per_1000", "now", "before", target=1.03, at_most=True)

    return [
        Comparison(
            "before-rpc",
            "no-op tasks, rpc://, -c 64 and prefetch 128",
            sides(lambda worker: throughput(worker, count, 64, 2)),
            [rate("tasks, rpc://"), cpu("tasks, rpc://")],
            extra=True,
        ),
        Comparison(
            "before-redis",
            "no-op tasks, redis://, -c 64",
            sides(lambda worker: throughput(worker, count, 64, 2, backend="redis")),
            [rate("tasks, redis://"), cpu("tasks, redis://")],
            extra=True,
        ),
        Comparison(
            "before-events",
            "no-op tasks, rpc://, with events and -l INFO",
            sides(lambda worker: throughput(worker, count, 64, 2, events=True, level="INFO")),
            [rate("tasks with events"), cpu("tasks with events")],
            extra=True,
        ),
        Comparison(
            "before-start",
            "from the start of the process to the first result",
            sides(start),
            [Row("start to first task done, now ÷ before", "s", "seconds", "now", "before", target=1.03, at_most=True)],
            extra=True,
        ),
        Comparison(
            "before-memory",
            "resident memory, idle and after 20,000 tasks with -l INFO",
            sides(lambda worker: memory(20_000, worker)),
            [
                Row("resident, idle, now ÷ before", "MB", "idle_mb", "now", "before", target=1.03, at_most=True),
                Row("resident after 20,000 tasks, now ÷ before", "MB", "all_mb", "now", "before", target=1.03, at_most=True),
            ],
            warm_ups=0,
            extra=True,
        ),
    ]
