"""Links between sites: limits, windows of the day, pauses, and their effect on managers and workers."""

import contextlib
import json
import signal
import sqlite3
from datetime import datetime, timedelta, timezone

import pytest

from support import MB, until


@pytest.fixture
def link(deployment):
    return Link(deployment)


class Link:
    """The one link of a deployment, by the command line."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.ends = deployment.origin_site, deployment.destination_site

    def __call__(self, command, *arguments, check=True):
        return self.deployment.cli("links", command, *self.ends, *arguments, check=check)

    def listed(self):
        (listed,) = json.loads(self.deployment.cli("links", "list", "--json"))
        return listed

    def counts(self):
        listed = self.listed()
        return listed["active"], listed["scheduled"], listed["pending"]


def statuses(deployment, transfers):
    return [deployment.status(transfer) for transfer in transfers]


def test_a_limit_applies_to_all_passes(deployment, broker, link):
    """No more messages than the link allows, the oldest first, and the next ones when the limit allows them."""
    transfers = [deployment.package(size=1000) for _ in range(5)]
    assert "at most 2 at once" in link("set", "--max-active", 2)
    for _ in range(2):
        done = json.loads(deployment.cli("manager", "--once", "--json"))
        assert statuses(deployment, transfers) == ["SCHEDULED"] * 2 + ["PENDING"] * 3
        assert done["held_back"] == 3
    assert broker.ready(deployment.queue) == 2
    assert link.counts() == (0, 2, 3)
    assert link.listed()["oldest_pending"] == transfers[2]

    worker = deployment.worker()
    for n in (2, 4):
        until(lambda: statuses(deployment, transfers)[:n] == ["COMPLETED"] * n, f"{n} are done")
        deployment.schedule()
        assert sum(link.counts()[:2]) <= 2
    deployment.reaches(transfers[4], "COMPLETED")
    for transfer in transfers:
        deployment.assert_moved(transfer)
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def test_a_lowered_limit_applies_to_sent_messages(deployment, broker, link):
    deployment.double(RATE=MB)
    transfers = [deployment.package(size=4 * MB) for _ in range(3)]
    deployment.schedule()
    assert link.counts() == (0, 3, 0)
    link("set", "--max-active", 1)
    worker = deployment.worker(concurrency=3)
    until(lambda: link.counts() == (1, 0, 2), "one runs, the others are PENDING")
    # A transfer that is run by hand ignores the limit.
    deployment.double()
    pending = [transfer for transfer in transfers if deployment.status(transfer) == "PENDING"]
    deployment.cli("transfers", "run", pending[0])
    worker.says("the transfer waits until one ends")
    until(lambda: link.counts() == (0, 0, 1), "both are done")
    deployment.schedule()
    until(lambda: link.counts() == (0, 0, 0), "all are done")
    broker.all_settled(deployment.queue)
    for transfer in transfers:
        deployment.assert_moved(transfer)
        assert deployment.row(transfer)["retry_count"] == 0


def test_transfers_wait_for_the_copies_of_a_worker(deployment):
    """They hold their leases meanwhile."""
    deployment.settings(transfer={"max_copies_per_link": 1})
    deployment.double(RATE=MB)
    transfers = [deployment.package(size=30 * MB) for _ in range(2)]
    worker = deployment.worker(concurrency=2)
    deployment.schedule()
    until(lambda: statuses(deployment, transfers) == ["IN_PROGRESS"] * 2, "both have begun")
    phases = lambda: [row["phase"] for row in deployment.rows("SELECT phase FROM transfer_worker_lease ORDER BY phase")]
    until(lambda: phases() == ["copying", "preparing"], "one is copied", log=lambda: str(phases()))
    worker.kill()


def test_a_window_of_the_day_closes_a_link(deployment, link):
    transfer = deployment.package(size=1000)
    now = datetime.now(timezone.utc)
    hour = timedelta(hours=1)
    clock = lambda time: time.strftime("%H:%M")
    around, later = f"{clock(now - hour)}-{clock(now + hour)}", f"{clock(now + hour)}-{clock(now + 2 * hour)}"
    link("set", "--max-active", 3, "--capacity", f"{around} UTC max_active=0", "--capacity", f"{later} UTC max_active=1")
    deployment.schedule()
    assert deployment.status(transfer) == "PENDING"
    listed = link.listed()
    assert (listed["max_active"], listed["limit_now"], len(listed["capacity"])) == (3, 0, 2)
    assert "closed at this time" in deployment.cli("links", "list")
    link("set", "--capacity", "default")
    deployment.schedule()
    assert deployment.status(transfer) == "SCHEDULED"


def test_a_paused_link_costs_no_retry(deployment, broker, link):
    """A message that was sent before puts its row back to PENDING; running copies are stopped only by --now."""
    deployment.double(RATE=MB)
    running, waiting = deployment.package(size=3 * MB), deployment.package(size=1000)
    worker = deployment.worker(concurrency=1)
    deployment.schedule()
    deployment.mid_copy(size=1)
    link("pause", "--reason", "observing Orion")
    shown = deployment.cli("links", "list")
    assert "observing Orion" in shown and "@" in shown, shown
    deployment.reaches(running, "COMPLETED")
    deployment.reaches(waiting, "PENDING")
    broker.all_settled(deployment.queue)
    deployment.schedule()
    assert deployment.status(waiting) == "PENDING", "nothing is sent over it"
    assert link.listed()["pause"]["reason"] == "observing Orion"
    refused = deployment.cli("transfers", "run", waiting, check=False)
    assert refused.returncode == 6 and "observing Orion" in refused.stderr

    link("resume")
    long = deployment.package(size=20 * MB)
    deployment.schedule()
    deployment.reaches(waiting, "COMPLETED")
    deployment.mid_copy(size=1)
    link("pause", "--now", "--reason", "link needed")
    deployment.reaches(long, "PENDING", 10)
    deployment.no_bbcp_left()
    broker.all_settled(deployment.queue)
    assert deployment.outcomes(long) == ["interrupted"] and deployment.leases() == []
    deployment.double()
    link("resume")
    deployment.schedule()
    deployment.reaches(long, "COMPLETED")
    for transfer in (running, waiting, long):
        deployment.assert_moved(transfer)
        assert deployment.row(transfer)["retry_count"] == 0
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def test_the_command_line(deployment, link):
    """Exit codes, refusals, and values of the row that override the file."""

    def refused(code, text, *words):
        done = deployment.cli("links", *words, check=False)
        assert done.returncode == code and text in done.stderr, done.stderr

    origin, destination = link.ends
    misspelt = origin[:-1]
    refused(3, f"the nearest one is `{origin}`", "pause", misspelt, destination, "--reason", "x")
    refused(2, "between two sites", "set", origin, origin, "--max-active", "1")
    refused(2, "--reason", "pause", origin, destination)
    refused(2, "one line of text", "pause", origin, destination, "--reason", " ")
    refused(2, "18:00-06:00 UTC max_active=1", "set", origin, destination, "--capacity", "at night")
    refused(2, "must be 1 to 64", "set", origin, destination, "--streams", "0")
    refused(2, "must be a rate", "set", origin, destination, "--max-rate=-x; id")
    refused(6, "is not paused", "resume", origin, destination)
    link("pause", "--reason", "first")
    refused(6, "first", "pause", origin, destination, "--reason", "second")
    assert json.loads(link("resume", "--json"))["pause"] is None

    link("set", "--streams", 3, "--window", "1m", "--priority", -2)
    shown = link("show")
    assert "set with `links set`; overrides 2 of the file" in shown, shown
    assert "(from the settings)" in shown
    transfer = deployment.package(size=1000)
    deployment.cli("transfers", "run", transfer)
    (copy,) = deployment.copies()
    argv = copy["argv"]
    assert argv[argv.index("-s") + 1] == "3" and argv[argv.index("-w") + 1] == "1m"
    link("set", "--streams", "default")
    assert json.loads(link("show", "--json"))["bbcp"]["streams"] == 2


def test_a_manager_for_some_sites(deployment):
    transfer = deployment.package(size=1000)
    unknown = deployment.cli("manager", "--once", "--site", deployment.origin_site[:-1], check=False)
    assert unknown.returncode == 3 and deployment.origin_site in unknown.stderr
    deployment.cli("manager", "--once", "--site", deployment.destination_site)
    assert deployment.status(transfer) == "PENDING"
    deployment.settings(manager={"sites": [deployment.origin_site]})
    deployment.schedule()
    assert deployment.status(transfer) == "SCHEDULED"


def test_a_database_without_the_table_of_links_works(deployment, link):
    """The table is created by an explicit migration; without it there are no limits, and everything else works."""
    with contextlib.closing(sqlite3.connect(deployment.database, timeout=20)) as connection, connection:
        connection.execute("DROP TABLE transfer_worker_link")
        connection.execute("DELETE FROM transfer_worker_migration WHERE version LIKE '%_links'")
    transfer = deployment.package(size=1000)
    deployment.worker()
    deployment.schedule()
    deployment.reaches(transfer, "COMPLETED")
    refused = link("pause", "--reason", "x", check=False)
    assert refused.returncode == 4 and "db migrate" in refused.stderr
    assert "everything that is needed" in deployment.cli("db", "check")
    deployment.cli("db", "migrate")
    assert link.listed()["max_active"] is None
