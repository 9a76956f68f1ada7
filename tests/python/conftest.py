"""Fixtures. The services are scripts/lib/services.sh's; see support.py for what the fixtures give.

With `-n 2 --dist loadfile` (pytest-xdist) two processes run the files side by side. A broker is stopped, asked for
all its workers and so on by tests that mean to be alone with it; so the second process has a broker of its own,
and a database of its own in the same Redis.
"""

import os
import shutil
import signal

import pytest

from support import Broker, Deployment, service


@pytest.fixture(scope="session")
def broker():
    broker = Broker()
    # By policy, not by arguments: the queues stay declared as any Celery worker declares them.
    broker.ctl("set_policy", "test-dead", "_data_transfer$", '{"dead-letter-exchange":"%s"}' % Broker.DEAD)
    return broker


@pytest.fixture(scope="session")
def bbcp(tmp_path_factory):
    """The double, copied: whatever runs this file was started by these tests."""
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
    """One deployment for a whole module, where the tests cannot disturb each other."""
    deployment = Deployment(tmp_path_factory.mktemp("shared"), bbcp, broker)
    yield deployment
    deployment.close()


@pytest.fixture
def tell(request):
    """Shows a line to whoever runs the tests, whether a test failed or not."""
    return lambda text: request.node.user_properties.append(("tells", text))


def pytest_runtest_logreport(report):
    """In the process that the others report to, or the only one."""
    told = [text for name, text in report.user_properties if name == "tells"]
    if report.when == "call" and told and "PYTEST_XDIST_WORKER" not in os.environ:
        print("", *told, sep="\n")


def take_second_broker():
    for name in ("TEST_AMQP_URL", "TEST_AMQPS_PORT", "TEST_TLS", "TEST_RABBITMQ_CTL", "RABBITMQCTL", "TEST_REDIS_URL"):
        os.environ[name] = service(f"SECOND_{name}")


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    if worker == "gw1":
        take_second_broker()
    elif worker != "gw0":
        raise pytest.UsageError("there are two brokers: no more than -n 2")
    config.addinivalue_line("markers", "timeout: limit of one test (pytest-timeout)")
    # The tests' own children are to be interruptible, however this run was started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
