"""Fixtures. The services are started by scripts/lib/services.sh; support.py has the classes of the fixtures' values.

With `-n 2 --dist loadfile` (pytest-xdist) two processes run the files side by side. Some tests need a broker for
themselves: they stop it, or ask it for all its workers. So the second process has its own broker, and its own database
in the same Redis.
"""

import os
import shutil
import signal

import pytest

from support import Broker, Deployment, RedisBroker, service


def pytest_generate_tests(metafunc):
    """Runs the tests of a module on each of its BROKERS, except for those that are about RabbitMQ."""
    kinds = getattr(metafunc.module, "BROKERS", None)
    if kinds and "broker" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("rabbitmq")
        metafunc.parametrize("broker", ["rabbitmq"] if only else kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def broker(request):
    if getattr(request, "param", "rabbitmq") == "redis":
        return RedisBroker()
    broker = Broker()
    # By policy, not by arguments, so that the queues are declared like those of any Celery worker.
    broker.ctl("set_policy", "test-dead", "_data_transfer$", '{"dead-letter-exchange":"%s"}' % Broker.DEAD)
    return broker


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


@pytest.fixture
def tell(request):
    """Prints a line in the test run's output, also if no test failed."""
    return lambda text: request.node.user_properties.append(("tells", text))


def pytest_runtest_logreport(report):
    """Runs in the process that collects the reports of the others, or in the only one."""
    texts = [text for name, text in report.user_properties if name == "tells"]
    if report.when == "call" and texts and "PYTEST_XDIST_WORKER" not in os.environ:
        print("", *texts, sep="\n")


def take_second_broker():
    for name in ("TEST_AMQP_URL", "TEST_AMQPS_PORT", "TEST_TLS", "TEST_RABBITMQ_CTL", "RABBITMQCTL", "TEST_REDIS_URL"):
        os.environ[name] = service(f"SECOND_{name}")


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    if worker == "gw1":
        take_second_broker()
    elif worker != "gw0":
        raise pytest.UsageError("there are two brokers: no more than -n 2")
    config.addinivalue_line("markers", "rabbitmq: the test needs RabbitMQ as the broker")
    config.addinivalue_line("markers", "timeout: limit of one test (pytest-timeout)")
    # The tests' children must be interruptible, even if this run was started with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
