"""Stands in for the package of this name in Celery's smoke tests: nothing is built, fetched or started in containers.

The result of `container` is a fixture whose value describes a container; pytest_celery beside it starts a process for a
worker's.
"""

import os
from types import SimpleNamespace

import pytest


def fxtr(name):
    """Refers to the value of a fixture."""
    return SimpleNamespace(fixture=name)


def resolve(request, value):
    return request.getfixturevalue(value.fixture) if hasattr(value, "fixture") else value


def container(wrapper_class=None, command=None, environment=None, **_):
    @pytest.fixture
    def described(request):
        needed = set(request.fixturenames)
        settings = request.getfixturevalue("default_worker_app") if "default_worker_app" in needed else None
        return SimpleNamespace(
            wrapper_class=wrapper_class,
            command=resolve(request, command),
            environment=resolve(request, environment) or {},
            app=settings,
            hostname="127.0.0.1",
            port=os.environ["REDIS_PORT"],
        )

    return described


def build(**_):
    return fixture_of_nothing()


fetch = network = volume = build


def fixture_of_nothing():
    @pytest.fixture
    def nothing():
        return None

    return nothing
