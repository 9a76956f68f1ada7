"""The bare loop of the benchmarks over Redis uses the scripts of the worker: a change of these must not break it."""

import json
import subprocess
from pathlib import Path

from brokers import RedisServer
from support import Process, service


def test_the_bare_loop_takes_every_message(tmp_path):
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    command = [Path(service("CCAT_TRANSFER_BIN")).parent / "ccat-bench", "--broker", server.url]

    def bench(*arguments):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    loop = None
    try:
        bench("redis-fill", "--queue", "bench", "--count", 300)
        loop = Process([*command, "redis-drain", "--queue", "bench", "--prefetch", "16"], tmp_path / "loop.log")
        figures = bench("redis-watch", "--count", 300, "--pid", loop.pid)
        assert figures["per_second"] > 0 and loop.running(), loop.log()
        assert (server.ready("bench"), server.client.hlen("unacked")) == (0, 0)
        assert len(server.client.keys("celery-task-meta-*")) == 300
    finally:
        if loop:
            loop.kill()
        server.stop()
