"""The database becomes unreachable during a copy. DATABASE_OUTAGE=60 makes the outage as long as in practice."""

import os
import time

import pytest

from proxy import Proxy
from support import MB, until
from variants import OnPostgres

OUTAGE = float(os.environ.get("DATABASE_OUTAGE", "8"))
LEASE_TTL = 3

pytestmark = pytest.mark.timeout(90 + 2 * OUTAGE)


@pytest.fixture
def deployment(tmp_path, bbcp, broker):
    deployment = OnPostgres(tmp_path, bbcp, broker)
    # A statement without an answer must time out early enough.
    deployment.settings(ops_db={**deployment.ops_db(), "acquire_timeout": "1s"})
    yield deployment
    deployment.close()


@pytest.fixture
def proxy(deployment):
    proxy = Proxy(deployment.server.host, deployment.server.port)
    yield proxy
    proxy.close()


def worker_behind(proxy, deployment):
    return deployment.worker(
        concurrency=1, name="cut-off", CCAT_DATA_TRANSFER_OPS_DB__DATABASE_POSTGRESQL_PORT=proxy.port
    )


def final(deployment, transfer):
    return deployment.destination / deployment.row(transfer)["relative_path"]


@pytest.mark.parametrize("silently", [False, True], ids=["refused", "silent"])
def test_the_copy_continues_without_the_database(deployment, proxy, silently):
    """The copy ends during the outage; it is verified, and committed when the database is back."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=3 * MB)
    worker = worker_behind(proxy, deployment)
    deployment.schedule()
    deployment.mid_copy()
    began = time.monotonic()
    proxy.pull(silently)
    until(lambda: deployment.copies()[0]["end"], "the copy ends")
    worker.says("copy finished; verifying")
    while time.monotonic() - began < OUTAGE:
        assert worker.running()
        assert deployment.status(transfer) == "IN_PROGRESS"
        # The owner of the transfer cannot be known, so no file is published.
        assert not final(deployment, transfer).exists() and deployment.temporary_files(transfer)
        time.sleep(0.2)
    assert "cannot be reached" in worker.log()
    proxy.plug()
    # The lease had expired; no other worker took it, so it still belongs to this worker.
    deployment.reaches(transfer, "COMPLETED", 30)
    deployment.assert_moved(transfer)
    assert len(deployment.copies()) == 1
    assert deployment.outcomes(transfer) == ["completed"]
    assert deployment.row(transfer)["retry_count"] == 0
    deployment.broker.all_settled(deployment.queue)


def test_a_copy_that_was_taken_over_is_not_published(deployment, proxy):
    """Another worker, which reaches the database, takes the transfer when the lease has expired. The first one returns
    with a verified copy, and must neither publish nor commit it."""
    deployment.double(RATE=MB)
    transfer = deployment.package(size=3 * MB)
    cut_off = worker_behind(proxy, deployment)
    deployment.schedule()
    deployment.mid_copy()
    proxy.pull(silently=True)
    began = time.monotonic()
    cut_off.says("copy finished; verifying")
    deployment.worker(concurrency=1, name="other")

    def taken_over():
        deployment.schedule()
        return deployment.status(transfer) == "COMPLETED"

    until(taken_over, "the other worker does it", 40)
    assert time.monotonic() - began > LEASE_TTL - 1, "not before the lease has run out"
    done = deployment.row(transfer)
    published = final(deployment, transfer).stat()
    assert len(deployment.copies()) == 2
    assert len(deployment.temporary_files(transfer)) <= 1

    proxy.plug()
    cut_off.says('"error_code":"lease_lost"', 40)
    deployment.broker.all_settled(deployment.queue)
    assert deployment.row(transfer) == done, "the row is as the other worker left it"
    assert final(deployment, transfer).stat().st_ino == published.st_ino, "the file is the other worker's"
    assert deployment.outcomes(transfer) == ["interrupted", "completed"]
    deployment.assert_moved(transfer)
