"""Several brokers: a list of servers, and the servers that sentinels watch. Another one is used when one fails."""

import contextlib
import json
import signal
import socket

import kombu.pools
import pytest
import redis
from celery import Celery

from brokers import RedisServer
from redis_site import SWEEPING, nothing_is_held, options, queue_name, received
from support import Process, backend_url, python_worker, tasks_worker, until

pytestmark = pytest.mark.timeout(180)

#: The name of the watched server.
MASTER = "broker"


class Sentinel:
    """One sentinel of a master, which decides alone."""

    def __init__(self, directory, master):
        directory.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        configuration = directory / "sentinel.conf"
        configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor {MASTER} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 3000\n"
        )
        self.process = Process(["redis-server", configuration, "--sentinel"], directory / "sentinel.log")
        self.client = redis.Redis(port=self.port)
        until(self.replicas, "the sentinel knows the replica", seconds=30, log=self.process.log)

    def replicas(self):
        with contextlib.suppress(redis.ConnectionError, redis.ResponseError):
            return [r for r in self.client.sentinel_slaves(MASTER) if r["master-link-status"] == "ok"]

    def master(self):
        return self.client.sentinel_get_master_addr_by_name(MASTER)[1]


class Pair:
    """A master and its replica, watched by a sentinel."""

    #: As clients address it.
    transport_options = RedisServer.transport_options | {"master_name": MASTER}

    def __init__(self, directory):
        self.servers = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            self.servers.append(RedisServer(directory / name, "--appendonly", "yes", "--repl-diskless-sync-delay", "0"))
        one, two = self.servers
        two.client.replicaof("127.0.0.1", one.port)
        until(lambda: two.client.info("replication")["master_link_status"] == "up", "the replica follows")
        self.sentinel = Sentinel(directory / "sentinel", one)
        with socket.create_server(("127.0.0.1", 0)) as unused:
            gone = unused.getsockname()[1]
        self.url = f"sentinel://127.0.0.1:{self.sentinel.port}/0"
        #: For our worker; redis-py tries the first one for half a minute.
        self.urls = f"sentinel://127.0.0.1:{gone}/0;{self.url}"

    def consumers(self, queue):
        return self.servers[0].consumers(queue)

    def options(self, **more):
        return options(broker_transport_options__master_name=MASTER) | more

    @contextlib.contextmanager
    def app(self):
        with Celery(broker=self.url, backend=backend_url("redis"), set_as_current=False) as app:
            app.conf.broker_transport_options = {"master_name": MASTER}
            yield app

    def is_switched(self):
        return self.sentinel.master() == self.servers[1].port

    def stop(self):
        for server in self.servers:
            with contextlib.suppress(ProcessLookupError):
                server.process.signal(signal.SIGCONT)
            server.process.stop()
        self.sentinel.process.stop()


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    pair.stop()


@pytest.mark.parametrize("how", ["request", "kill", "freeze"])
def test_a_failover_of_sentinels_is_followed(pair, run, how):
    """Under load, beside a Python worker: the worker uses the new master soon, and loses no message."""
    queue = queue_name()
    one, two = pair.servers
    variables = {"CELERY_BROKER_URL": pair.urls}
    more = pair.options(task_acks_late="true")
    worker = run(tasks_worker, queue, pair, backend_url("redis"), "-c", "4", variables=variables, **more)
    settings = SWEEPING | {"broker_transport_options": pair.transport_options}
    run(python_worker, queue, pair, backend_url("redis"), settings=settings)
    with pair.app() as app:
        results = [app.send_task("tasks.sleep", [0.05], queue=queue) for _ in range(150)]
        running = app.send_task("tasks.sleep", [6], queue=queue)
        # Redis copies to replicas later; only what has been copied survives.
        assert one.client.wait(1, 5000) == 1
        if how == "request":
            pair.sentinel.client.execute_command("SENTINEL FAILOVER", MASTER)
        else:
            one.process.signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        until(pair.is_switched, "the sentinel has chosen the other server", seconds=30)
        ours = lambda: [c for c in two.client.client_list() if c["name"].startswith("tasks")]
        is_complete = lambda: len(ours()) >= 3 and any(int(client["psub"]) for client in ours())
        # One or two seconds on an idle machine.
        until(is_complete, "the worker uses the new master, also for remote control", seconds=7, log=worker.log)
        if how == "freeze":
            # Its Python clients wait for it without a limit.
            one.process.signal(signal.SIGCONT)
        missing = {*results, running}

        def all_done():
            missing.difference_update([result for result in missing if result.state == "SUCCESS"])
            return not missing

        with contextlib.suppress(AssertionError):
            until(all_done, "all are done", seconds=60)
        # A Python worker takes a message and records it by two commands: a failover in between loses this message.
        ours = {result.id for result in missing} & received(worker)
        assert not ours and len(missing) <= 1, f"{len(missing)} of 151 are lost, of these by us: {ours}"
        kombu.pools.reset()
        with pair.app() as other:
            until(lambda: other.control.ping(timeout=1), "remote control works")
        assert worker.running()
    assert "READONLY" not in worker.log()[-5000:]
    nothing_is_held(two)


@pytest.mark.parametrize("strategy", ["round-robin", "shuffle"])
def test_the_next_server_of_a_list_is_used(tmp_path, run, strategy):
    """A replica is not used; if the server returns, the worker stays with its choice, with all of its connections."""
    servers = []
    for name in ("one", "two", "replica"):
        (tmp_path / name).mkdir()
        servers.append(RedisServer(tmp_path / name))
    one, two, replica = servers
    try:
        replica.client.replicaof("127.0.0.1", one.port)
        urls = [one.url, replica.url, two.url]
        queue = queue_name()
        one_url, one.url = one.url, ";".join(urls)
        worker = run(tasks_worker, queue, one, backend_url("redis"), broker_failover_strategy=strategy)
        one.url = one_url

        def answer(server):
            with Celery(broker=server.url, backend=backend_url("redis"), set_as_current=False) as app:
                assert app.send_task("tasks.add", [1, 1], queue=queue).get(timeout=15) == 2
                # The subscription for remote control may come a moment later.
                stats = until(lambda: app.control.inspect(timeout=1, destination=[node]).stats(), "it answers")
                return stats[node]["broker"]

        node = f"tasks-{queue}@{socket.gethostname()}"
        before = answer(one)
        assert (before["port"], before["failover_strategy"]) == (one.port, strategy)
        one.process.kill()
        worker.says("connected to the next broker of the list")
        after = answer(two)
        assert after["port"] == two.port
        assert len(after["alternates"]) == 3
        one.start()
        assert answer(two)["port"] == two.port
        ours = lambda server: [c for c in server.client.client_list() if c["name"].startswith("tasks")]
        assert (ours(one), ours(replica)) == ([], [])
        assert ours(two)
    finally:
        for server in servers:
            server.process.stop()


def test_each_broker_of_a_list_is_checked(deployment, tmp_path):
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes")
    try:
        for urls, verdict in {
            f"{server.url};redis://127.0.0.1:1/0": "yellow",
            "redis://127.0.0.1:1/0;redis://127.0.0.1:2/0": "red",
        }.items():
            done = deployment.cli("doctor", "--json", check=False, CELERY_BROKER_URL=urls)
            [found] = [found for found in json.loads(done.stdout)["checks"] if found["check"] == "broker"]
            assert found["verdict"] == verdict, found
            assert "redis://127.0.0.1:1/0: broker" in found["found"]
    finally:
        server.process.stop()
