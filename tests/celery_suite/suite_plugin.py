"""Runs Celery's own tests against a worker in another process: a pytest plugin, see scripts/celery-suite.sh.

    SUITE_WORKER       `rust` or `python`
    SUITE_WORKER_BIN   the program of the Rust worker, the example `celery_suite`
    SUITE_LOGS         directory for the logs of the workers
    SUITE_OUTCOMES     file for the outcome of each test

Celery's fixtures start their worker by `celery.contrib.testing.worker.start_worker`, in a thread of the tests' process. This
plugin replaces that function. Both kinds of worker run as processes, so that what a test can see of its worker is the same.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest
from celery.contrib.testing import worker as testing
from celery.utils.nodenames import anon_nodename

from suite_workers import start

# The suite's own limit is five minutes. No test that passes takes as long as this.
SECONDS_PER_TEST = 60


@contextlib.contextmanager
def start_worker(app, concurrency=1, pool="prefork", **_):
    """Starts a worker for `app`, which has the suite's settings, and yields when it answers."""
    settings = {key: app.conf[key] for key in ("broker_url", "result_backend", "result_extended")}
    worker = start(settings | {"worker_concurrency": concurrency}, name=anon_nodename(), queue="celery")
    try:
        worker.await_answer(app)
        yield worker
    finally:
        worker.stop()


testing.start_worker = start_worker


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST), append=False)


class Outcomes:
    """Writes the outcome of each test to a file: passed, failed or skipped. A test that is expected to fail is left out."""

    def __init__(self, path):
        self.path, self.tests = path, {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            # At once: the summary at the end is lost if the run is interrupted.
            with open(f"{self.path}.failures", "a") as file:
                print(f"== {report.nodeid} ({report.when})\n{report.longreprtext[-2000:]}\n", file=file)
        if hasattr(report, "wasxfail"):
            self.tests[report.nodeid] = "expected"
        elif report.failed or (report.when == "call" and self.tests.get(report.nodeid) in (None, "passed")):
            # A failure of one step, or of one subtest, is that of the test.
            if self.tests.get(report.nodeid) != "failed":
                self.tests[report.nodeid] = report.outcome
        elif report.skipped:
            self.tests.setdefault(report.nodeid, "skipped")

    def pytest_sessionfinish(self):
        kept = {test: outcome for test, outcome in self.tests.items() if outcome != "expected"}
        Path(self.path).write_text(json.dumps(kept, indent=1))


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(os.environ["SUITE_OUTCOMES"]), "outcomes")
