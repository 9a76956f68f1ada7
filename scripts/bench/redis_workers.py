"""Comparisons with Redis as the broker and for results: our worker, Python's, and a bare loop with the same scripts."""

import os
import time

from .sides import Comparison, Figures, Row, program, redis_bench, running
from .workers import python, rust


def on_redis(worker):
    """The same worker, with Redis as the broker and for results."""

    def command(*arguments):
        words, environment = worker(*arguments)
        url = os.environ["TEST_REDIS_URL"]
        return words, {**environment, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}

    return command


def loop(queue, concurrency, multiplier):
    """Command of a bare loop that claims, stores one result and settles."""
    command = [program("ccat-bench"), "--broker", os.environ["TEST_REDIS_URL"], "redis-drain", "--queue", queue]
    return [*command, "--prefetch", str(concurrency * multiplier)], {}


WORKERS = {"ccat-transfer": on_redis(rust), "python": on_redis(python), "bare loop": loop}


def throughput(worker, count, *arguments):
    """Tasks per second from a full queue, from the first tenth of them to the last one."""

    def measure():
        redis_bench("redis-fill", "--queue", "bench", "--count", count)
        with running(*worker("bench", *arguments)) as process:
            return redis_bench("redis-watch", "--count", count, "--pid", process.pid)

    return measure


def latency(worker, seconds):
    """Time from publish to result at 100 tasks a second."""

    def measure():
        redis_bench("redis-fill", "--queue", "bench", "--count", 0)
        with running(*worker("bench", 2, 4)):
            return redis_bench("redis-latency", "--queue", "bench", "--rate", 100, "--seconds", seconds)

    return measure


def idle(worker, seconds):
    """Commands that an idle worker sends, without those of its start."""

    def measure():
        redis_bench("redis-fill", "--queue", "bench", "--count", 0)
        with running(*worker("bench", 4, 1)):
            time.sleep(5)
            return Figures(redis_bench("redis-commands", "--seconds", seconds))

    return measure


def comparisons(quick):
    """All comparisons of this module."""
    ours, theirs = (8_000, 1_500) if quick else (16_000, 1_500)
    return [
        Comparison(
            "broker-redis",
            "no-op tasks with Redis as the broker and for results, -c 64 and prefetch 128 against prefork -c 2, and against a bare loop",
            {
                "ccat-transfer": throughput(WORKERS["ccat-transfer"], ours, 64, 2),
                "python": throughput(WORKERS["python"], theirs, 2, 4),
                "bare loop": throughput(WORKERS["bare loop"], ours, 64, 2),
            },
            [
                Row("tasks, Redis as the broker, against Python", "1/s", "per_second", "ccat-transfer", "python", target=8, stretch=12),
                Row("tasks, Redis as the broker, against the bare loop", "1/s", "per_second", "ccat-transfer", "bare loop", target=0.7, stretch=0.9),
                Row("CPU for 1,000 tasks, Redis as the broker, Python's ÷ ours", "s", "cpu_s_per_1000", "ccat-transfer", "python", inverted=True, target=10, stretch=15),
            ],
        ),
        Comparison(
            "broker-redis-latency",
            "from publish to result at 100 tasks a second, Redis as the broker",
            {name: latency(worker, 2) for name, worker in WORKERS.items()},
            [
                Row("publish to done, Redis as the broker, median", "ms", "median_ms", "ccat-transfer", "python", target=0.6, stretch=0.4, at_most=True),
                Row("publish to done, Redis as the broker, p99", "ms", "p99_ms", "ccat-transfer", "python", target=0.6, stretch=0.4, at_most=True),
            ],
            warm_ups=0,
        ),
        Comparison(
            "broker-redis-idle",
            "commands that an idle worker sends to Redis",
            {name: idle(WORKERS[name], 10 if quick else 30) for name in ("ccat-transfer", "python")},
            [
                Row("commands of an idle worker", "1/s", "per_second", "ccat-transfer", target=2, stretch=0.5, at_most=True),
                Row("commands of an idle worker, against Python", "1/s", "per_second", "ccat-transfer", "python", at_most=True),
            ],
            warm_ups=0,
            pairs=1,
        ),
    ]
