"""Fixtures. The services are started by scripts/lib/services.sh; support.py has the classes of the fixtures' values.

With `-n 3 --dist loadfile` (pytest-xdist) three processes run the files side by side. Some tests need a broker for
themselves: they stop it, or ask it for all its workers. So each further process has its own broker, and its own database
in the same Redis.
"""

import contextlib
import os
import pathlib
import shutil
import signal

import kombu.pools
import pytest

from brokers import DURABLE, Broker, RedisBroker, RedisServer
from long_link import LongLink, Sites, Unavailable
from support import Deployment, service

#: The first word of the variables of each process's broker; none for the first process.
BROKER_PREFIXES = {"gw0": None, "gw1": "SECOND", "gw2": "THIRD"}

#: Modules that take minutes.
LONG = {"test_cluster", "test_faults", "test_link_failures", "test_redis_soak", "test_soak"}


def pytest_collection_modifyitems(items):
    """Runs the long modules first, so that none of them is left to one process at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_generate_tests(metafunc):
    """Runs the tests of a module on each of its BROKERS, except for those that are about RabbitMQ."""
    kinds = getattr(metafunc.module, "BROKERS", None)
    if kinds and "broker" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker
        if marked("rabbitmq"):
            kinds = ["rabbitmq"]
        if marked("stops_the_broker"):
            kinds = [{"redis": "own-redis"}.get(kind, kind) for kind in kinds]
        metafunc.parametrize("broker", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def broker(request, tmp_path_factory):
    kind = getattr(request, "param", "rabbitmq")
    if kind == "redis":
        yield RedisBroker()
        return
    if kind == "own-redis":
        server = RedisServer(tmp_path_factory.mktemp("redis"), *DURABLE)
        yield server
        server.stop()
        return
    broker = Broker()
    # By policy, not by arguments, so that the queues are declared like those of any Celery worker.
    broker.ctl("set_policy", "test-dead", "_data_transfer$", '{"dead-letter-exchange":"%s"}' % Broker.DEAD)
    yield broker


@pytest.fixture(scope="session")
def bbcp(tmp_path_factory):
    """A copy of the double, so that every process of this file was started by these tests."""
    copy = tmp_path_factory.mktemp("bbcp") / "bbcp-double"
    shutil.copy2(service("BBCP_DOUBLE"), copy)
    return copy.resolve()


@pytest.fixture
def deployment(tmp_path, bbcp, broker):
    deployment = Deployment(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


@pytest.fixture(scope="module")
def shared_deployment(tmp_path_factory, bbcp, broker):
    """One deployment for a whole module whose tests cannot disturb each other."""
    deployment = Deployment(tmp_path_factory.mktemp("shared"), bbcp, broker)
    yield deployment
    deployment.close()


@pytest.fixture(scope="module", autouse=True)
def new_connections():
    """No module uses a pooled connection that another one has broken."""
    kombu.pools.reset()


@pytest.fixture(scope="session")
def long_link_program():
    return pathlib.Path(service("CCAT_TRANSFER_BIN")).with_name("long-link")


@pytest.fixture(scope="module")
def long_link(tmp_path_factory, long_link_program):
    """Two hosts with a long link between them, see long_link.py."""
    try:
        link = LongLink(long_link_program, tmp_path_factory.mktemp("link"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield link
    link.close()


@pytest.fixture
def link(long_link):
    """The link with a short round trip and without faults; each test may change it."""
    long_link.reset()
    return long_link


@pytest.fixture(scope="module")
def sites_of_module(request, long_link, bbcp, tmp_path_factory):
    sites = Sites.for_tests(long_link, bbcp, tmp_path_factory.mktemp("double"))
    sites.settings(**getattr(request.module, "SETTINGS", {}))
    return sites


@pytest.fixture
def sites(link, sites_of_module):
    """A site on each host. The settings are the SETTINGS of the module; each test may change them."""
    with sites_of_module.settings_of_a_test():
        yield sites_of_module


@pytest.fixture
def server(tmp_path):
    """A Redis server of one test."""
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis", *DURABLE)
    yield server
    server.stop()


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


@pytest.fixture
def tell(request):
    """Prints a line in the test run's output, also if no test failed."""
    return lambda text: request.node.user_properties.append(("tells", text))


def pytest_runtest_logreport(report):
    """Runs in the process that collects the reports of the others, or in the only one."""
    texts = [text for name, text in report.user_properties if name == "tells"]
    if report.when == "call" and texts and "PYTEST_XDIST_WORKER" not in os.environ:
        print("", *texts, sep="\n")


def take_broker(prefix):
    for name in ("TEST_AMQP_URL", "TEST_AMQPS_PORT", "TEST_TLS", "TEST_RABBITMQ_CTL", "RABBITMQCTL", "TEST_REDIS_URL"):
        os.environ[name] = service(f"{prefix}_{name}")


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    if worker not in BROKER_PREFIXES:
        limit = len(BROKER_PREFIXES)
        raise pytest.UsageError(f"there are {limit} brokers: no more than -n {limit}")
    if prefix := BROKER_PREFIXES[worker]:
        take_broker(prefix)
    config.addinivalue_line("markers", "rabbitmq(why): the test is about RabbitMQ, because of this property")
    config.addinivalue_line("markers", "stops_the_broker: the test needs a Redis of its own, not the shared one")
    config.addinivalue_line("markers", "timeout: limit of one test (pytest-timeout)")
    # The tests' children must be interruptible, even if this run was started with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
