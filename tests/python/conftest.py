"""Fixtures. The services are scripts/lib/services.sh's; see support.py for what the fixtures give."""

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


def pytest_configure(config):
    config.addinivalue_line("markers", "timeout: limit of one test (pytest-timeout)")
    # The tests' own children are to be interruptible, however this run was started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
