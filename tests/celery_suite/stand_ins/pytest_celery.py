"""Stands in for pytest-celery in Celery's smoke tests: a worker is a process instead of a container.

The broker and the result backend are the servers of scripts/celery-suite.sh (TEST_BROKER, TEST_BACKEND). A test that needs
more of a container (to restart a broker, another version of Celery) or reads the text of the log of Python's worker is
skipped, for both kinds of worker.
"""

import os
import re
import signal as signals
import time
from types import SimpleNamespace

import celery
import pytest
import redis
from celery import Celery
from kombu import Connection
from suite_workers import start

RESULT_TIMEOUT = 30
RABBITMQ_PORTS, REDIS_PORTS, REDIS_ENV, LOCALSTACK_CREDS = {}, {}, {}, {"AWS_DEFAULT_REGION": "nowhere"}
REDIS_IMAGE, REDIS_CONTAINER_TIMEOUT, RABBITMQ_CONTAINER_TIMEOUT = "", 60, 60
defaults = SimpleNamespace(DEFAULT_WORKER_VOLUME={}, DEFAULT_WORKER_CONTAINER_TIMEOUT=60)


def need(what):
    pytest.skip(f"needs {what}")


class Containers:
    """A server whose container a test cannot use here."""

    @classmethod
    def command(cls, *arguments, **_):
        return ["server", *arguments]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        need(f"the container of a server ({name})")


class RabbitMQContainer(Containers):
    pass


class RedisContainer(Containers):
    pass


class CeleryTestBroker(Containers):
    def __init__(self, container=None):
        pass

    def teardown(self):
        pass


class RabbitMQTestBroker(CeleryTestBroker):
    pass


class RedisTestBroker(CeleryTestBroker):
    pass


class RedisTestBackend(CeleryTestBroker):
    pass


class MemcachedTestBackend(CeleryTestBroker):
    def __init__(self, container=None):
        need("memcached")


class Cluster:
    def __init__(self, *nodes):
        self.nodes = nodes

    def __getitem__(self, index):
        return self.nodes[index]

    def __iter__(self):
        return iter(self.nodes)

    def __len__(self):
        return len(self.nodes)

    def teardown(self):
        for node in self.nodes:
            node.teardown()


class CeleryBrokerCluster(Cluster):
    pass


class CeleryBackendCluster(Cluster):
    pass


class CeleryWorkerCluster(Cluster):
    pass


class CeleryWorkerContainer:
    """Names of a kind of worker."""

    @classmethod
    def version(cls):
        return ""

    @classmethod
    def buildargs(cls):
        return {}

    @classmethod
    def command(cls, *arguments, **_):
        return list(arguments)


class Process:
    """What a test asks of a worker's container."""

    def __init__(self, worker):
        self.worker = worker

    def reload(self):
        time.sleep(0.1)

    @property
    def status(self):
        return "running" if self.worker.process.poll() is None else "exited"

    @property
    def attrs(self):
        return {"State": {"ExitCode": self.worker.process.poll()}}

    def kill(self, signal="SIGKILL"):
        self.worker.signal(getattr(signals, signal))

    def __getattr__(self, name):
        need(f"the container of a worker ({name})")


class CeleryTestWorker:
    """A worker process; `container` says which."""

    def __init__(self, container, app=None):
        names = container.wrapper_class
        if names.version() != celery.__version__:
            need("another version of Celery")
        if hasattr(names, "app_module"):
            need("a Python module of its own for the worker")
        if container.command and any("=gevent" in word or "=eventlet" in word for word in container.command):
            need("another pool of Python's worker")
        self.app, self.names = container.app, names
        settings = dict(container.app.conf.changes)
        name = f"{names.worker_name()}@suite"
        # The address of Redis in a container is not that of the server.
        variables = {key: value for key, value in container.environment.items() if not key.startswith("REDIS_")}
        self.process = start(settings, name, names.worker_queue(), flags=container.command, environment=variables)
        self.container = Process(self.process)
        self.process.await_answer(container.app)

    version = property(lambda self: self.names.version())
    worker_name = property(lambda self: self.names.worker_name())
    worker_queue = property(lambda self: self.names.worker_queue())

    def hostname(self):
        return self.process.hostname

    def kill(self, signal="SIGKILL", reload_container=True):
        self.container.kill(signal)
        if signal == "SIGKILL":
            self.process.wait()

    def restart(self, reload_container=True, force=False):
        self.process.stop()
        self.process.launch()
        self.process.await_answer(self.app)

    def logs(self):
        need("the log of Python's worker")

    def assert_log_exists(self, *_, **__):
        need("the log of Python's worker")

    wait_for_log = assert_log_exists

    def assert_log_does_not_exist(self, log, message="", timeout=1):
        time.sleep(timeout)
        assert not re.search(log, self.process.log.read_text(errors="replace")), message

    def get_running_processes_info(self, *_, **__):
        need("child processes of a worker")

    def teardown(self):
        self.process.stop()


class CeleryTestSetup:
    def __init__(self, worker_cluster, broker_cluster, backend_cluster, app):
        self.worker_cluster, self.broker_cluster, self.backend_cluster = worker_cluster, broker_cluster, backend_cluster
        self.app = app

    worker = property(lambda self: self.worker_cluster[0])
    broker = property(lambda self: self.broker_cluster[0])
    backend = property(lambda self: self.backend_cluster and self.backend_cluster[0])

    def ready(self, **_):
        return True


@pytest.fixture
def default_rabbitmq_broker():
    return None


@pytest.fixture
def default_rabbitmq_broker_env():
    need("several brokers in containers")


@pytest.fixture
def celery_rabbitmq_broker():
    if not os.environ["TEST_BROKER"].startswith("amqp"):
        need("RabbitMQ as the broker")
    return RabbitMQTestBroker()


@pytest.fixture
def celery_redis_broker():
    if not os.environ["TEST_BROKER"].startswith("redis"):
        need("Redis as the broker")
    return RedisTestBroker()


@pytest.fixture
def celery_memcached_backend():
    return MemcachedTestBackend()


@pytest.fixture
def celery_redis_backend():
    return RedisTestBackend()


@pytest.fixture
def celery_broker_cluster(request):
    kind = "rabbitmq" if os.environ["TEST_BROKER"].startswith("amqp") else "redis"
    return CeleryBrokerCluster(request.getfixturevalue(f"celery_{kind}_broker"))


@pytest.fixture
def celery_backend_cluster(celery_redis_backend):
    return CeleryBackendCluster(celery_redis_backend)


@pytest.fixture
def celery_setup_config(celery_broker_cluster, celery_backend_cluster):
    config = {"broker_url": os.environ["TEST_BROKER"]}
    if celery_backend_cluster:
        config["result_backend"] = os.environ["TEST_BACKEND"]
    return config


@pytest.fixture
def celery_setup_app(celery_setup_config):
    app = Celery("suite")
    app.conf.update(celery_setup_config)
    app.set_default()
    app.set_current()
    yield app
    app.close()
    clean_servers()


# What the workers of one test declare, and those of the next one declare with other arguments.
QUEUES = ["celery", "default_queue", "smoke_tests_queue", "chord_unlock_queue", "chord_headers_queue"]
EXCHANGES = ["celery", "default_queue", "smoke_tests_queue", "chord_unlock_queue", "chord_headers_exchange"]


def clean_servers():
    """Removes what a test leaves; with containers, each test has servers of its own."""
    redis.Redis(port=int(os.environ["REDIS_PORT"])).flushall()
    if os.environ["TEST_BROKER"].startswith("amqp"):
        with Connection(os.environ["TEST_BROKER"]) as connection:
            for queue in QUEUES:
                connection.default_channel.queue_delete(queue)
            for exchange in EXCHANGES:
                connection.default_channel.exchange_delete(exchange)


@pytest.fixture
def default_worker_app(celery_setup_app):
    return celery_setup_app


@pytest.fixture
def default_worker_env():
    return {}


@pytest.fixture
def default_worker_tasks():
    return set()


@pytest.fixture
def default_worker_signals():
    return set()


@pytest.fixture
def default_worker_command(default_worker_container_cls):
    return default_worker_container_cls.command()


@pytest.fixture
def celery_setup_worker(default_worker_container_cls, default_worker_app, default_worker_command, default_worker_env):
    described = SimpleNamespace(
        wrapper_class=default_worker_container_cls,
        app=default_worker_app,
        command=default_worker_command,
        environment=default_worker_env,
    )
    worker = CeleryTestWorker(described)
    yield worker
    worker.teardown()


@pytest.fixture
def celery_worker(celery_setup_worker):
    return celery_setup_worker


@pytest.fixture
def celery_worker_cluster(celery_worker):
    return CeleryWorkerCluster(celery_worker)


@pytest.fixture
def celery_setup_cls():
    return CeleryTestSetup


@pytest.fixture
def celery_setup(
    celery_setup_cls, celery_broker_cluster, celery_backend_cluster, celery_setup_app, celery_worker_cluster
):
    return celery_setup_cls(celery_worker_cluster, celery_broker_cluster, celery_backend_cluster, celery_setup_app)
