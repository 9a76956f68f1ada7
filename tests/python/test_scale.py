"""Three managers, two of them for some sites only and all of them overlapping, and eight workers, on one PostgreSQL and
one broker: every transfer is moved exactly once, and no link exceeds its limit at any moment.

`SCALE_TRANSFERS` sets the number of transfers; the default is for CI.
"""

import collections
import itertools
import json
import os
import signal
import threading
import time

import pytest

from support import Process, clean_environment, service, sha256, until
from variants import OnPostgres

TRANSFERS = int(os.environ.get("SCALE_TRANSFERS", "120"))
WORKERS, SLOTS = 8, 2
LIMIT = 24
BYTES = 2000

pytestmark = pytest.mark.timeout(120 + TRANSFERS)

BROKERS = ["rabbitmq", "redis"]

MOVED = """
SELECT t.id, t.status::text AS status, t.retry_count, p.relative_path, o.path AS origin, d.path AS destination
FROM data_transfer t JOIN data_transfer_package p ON p.id = t.data_transfer_package_id
JOIN disk_data_location o ON o.data_location_id = t.origin_location_id
JOIN disk_data_location d ON d.data_location_id = t.destination_location_id
"""


class Sites(OnPostgres):
    """Two origins and two destinations, hence four links."""

    def __init__(self, directory, bbcp, broker):
        super().__init__(directory, bbcp, broker)
        self.origins = [self.origin_site, self.origin_site + "b"]
        self.destinations = [self.destination_site, self.destination_site + "b"]
        self.queues = [f"{site}_buffer_data_transfer" for site in self.origins]
        topology = directory / "further.toml"
        sites = []
        for site in (self.origins[1], self.destinations[1]):
            (directory / site).mkdir()
            sites.append(
                f'[[sites]]\nname = "{site}"\nshort_name = "{site}"\n[[sites.locations]]\nname = "buffer"\n'
                f'type = "buffer"\nstorage = "disk"\npath = "{directory / site}"\n'
            )
        for origin, destination in itertools.product(self.origins, self.destinations):
            sites.append(f'[[routes]]\norigin = "{origin}"\ndestination = "{destination}"\nmethod = "bbcp"\ntype = "direct"\n')
        topology.write_text("".join(sites))
        self.cli("db", "seed", topology)
        for queue in self.queues[1:]:
            broker.declare(queue)

    def close(self):
        super().close()
        for queue in self.queues[1:]:
            self.broker.delete(queue)

    def fill(self, count):
        """Creates `count` packages, spread over all links, and their transfers."""
        places = {row["short_name"]: row for row in self.rows(
            "SELECT s.short_name, l.id, d.path FROM site s JOIN data_location l ON l.site_id = s.id"
            " JOIN disk_data_location d ON d.data_location_id = l.id"
        )}
        links = list(itertools.product(self.origins, self.destinations))
        with self.connection.transaction(), self.connection.cursor() as cursor:
            for n in range(count):
                origin, destination = (places[site] for site in links[n % len(links)])
                name = f"{n % 10}/{n}.tar"
                path = self.directory / origin["path"] / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(os.urandom(BYTES))
                cursor.execute(
                    "WITH p AS (INSERT INTO data_transfer_package (file_name, relative_path, size, status)"
                    " VALUES (%s, %s, %s, 'WAITING') RETURNING id)"
                    " INSERT INTO data_transfer (data_transfer_package_id, origin_location_id, destination_location_id,"
                    " status, unpack_status, retry_count) SELECT id, %s, %s, 'PENDING', 'PENDING', 0 FROM p",
                    [f"{n}.tar", name, BYTES, origin["id"], destination["id"]],
                )

    def manager(self, *arguments):
        process = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", self.config, "manager", *arguments],
            self.directory / f"manager-{len(self.processes)}.log",
            cwd=self.directory,
            env=clean_environment(),
        )
        self.processes.append(process)
        return process


class Watched(threading.Thread):
    """Observes the links: the maximum number of simultaneous transfers of each."""

    def __init__(self, deployment):
        super().__init__(daemon=True)
        self.connection = deployment._connect(deployment.database_name)
        self.stop = threading.Event()
        self.most, self.looks = collections.Counter(), 0

    def run(self):
        with self.connection:
            while not self.stop.wait(0.05):
                # By location ids, because all locations have the same name.
                rows = self.connection.execute(
                    "SELECT origin_location_id AS o, destination_location_id AS d, count(*) AS active FROM data_transfer"
                    " WHERE status IN ('SCHEDULED', 'IN_PROGRESS') GROUP BY 1, 2"
                )
                for row in rows:
                    link = row["o"], row["d"]
                    self.most[link] = max(self.most[link], row["active"])
                self.looks += 1


def lines(process, message):
    return [line for line in map(json.loads, process.log().splitlines()) if line.get("message") == message]


def test_exactly_once(tmp_path, bbcp, broker, tell):
    deployment = Sites(tmp_path, bbcp, broker)
    try:
        summary = run(deployment)
    finally:
        deployment.close()
    tell(summary)


def run(deployment):
    deployment.settings(ops_db={"max_connections": 2}, manager={"sleep_time": "500ms"})
    deployment.double()
    for origin, destination in itertools.product(deployment.origins, deployment.destinations):
        deployment.cli("links", "set", origin, destination, "--max-active", LIMIT)
    deployment.fill(TRANSFERS)
    watched = Watched(deployment)
    watched.start()

    deployment.queue, single = ",".join(deployment.queues), deployment.queue
    workers = [deployment.worker(concurrency=SLOTS, ready=False, name=f"w{n}") for n in range(WORKERS)]
    deployment.queue = single
    for worker in workers:
        worker.says("worker ready", 60)
    began = time.monotonic()
    managers = [
        deployment.manager(),
        deployment.manager("--site", deployment.origins[0]),
        deployment.manager("--site", ",".join(deployment.origins)),
    ]
    status = "SELECT status::text AS status, count(*) AS count FROM data_transfer GROUP BY 1"
    done = lambda: {row["status"]: row["count"] for row in deployment.rows(status)} == {"COMPLETED": TRANSFERS}
    until(done, "everything is moved", 60 + TRANSFERS)
    seconds = time.monotonic() - began
    for process in managers + workers:
        process.signal(signal.SIGTERM)
    assert [process.ended(30) for process in managers + workers] == [0] * (len(managers) + WORKERS)
    watched.stop.set()
    watched.join()

    # Rows and files.
    rows = deployment.rows(MOVED)
    assert len(rows) == TRANSFERS and {row["retry_count"] for row in rows} == {0}
    digests = {}
    for row in rows:
        there = f"{row['destination']}/{row['relative_path']}"
        digests[row["id"]] = sha256(there)
        assert digests[row["id"]] == sha256(f"{row['origin']}/{row['relative_path']}")
    files = [path for site in deployment.destinations[1:] for path in (deployment.directory / site).rglob("*")]
    files += deployment.destination.rglob("*")
    assert sum(path.is_file() for path in files) == TRANSFERS, "nothing is left over"
    # One attempt for each transfer, with the digest of the file.
    attempts = deployment.rows("SELECT data_transfer_id, attempt, outcome, digest, worker FROM transfer_worker_attempt")
    assert {(a["data_transfer_id"], a["attempt"], a["outcome"], a["digest"]) for a in attempts} == {
        (row, 1, "completed", f"sha256:{digest}") for row, digest in digests.items()
    }
    assert len(attempts) == TRANSFERS and deployment.leases() == []
    # One message for each transfer, by the managers' counts of sent and the workers' counts of received messages.
    sent = [sum(line["scheduled"] for line in lines(manager, "pass finished")) for manager in managers]
    received = [len(lines(worker, "task received")) for worker in workers]
    assert sum(sent) == TRANSFERS == sum(received), (sent, received)
    assert deployment.rows("SELECT sum(issued)::int AS issued FROM transfer_worker_link")[0]["issued"] == TRANSFERS
    # One copy for each transfer.
    copies = deployment.copies()
    assert len(copies) == TRANSFERS == len({tuple(copy["argv"]) for copy in copies})
    # No link has exceeded its limit.
    assert max(watched.most.values()) <= LIMIT and len(watched.most) == 4, watched.most
    by_worker = collections.Counter(attempt["worker"] for attempt in attempts)
    return (
        f"{TRANSFERS} transfers in {seconds:.1f} s ({TRANSFERS / seconds:.1f}/s), each exactly once: {len(attempts)} attempts,"
        f" {sum(sent)} messages sent, {sum(received)} received, {len(copies)} copies, {len(digests)} digests agree\n"
        f"managers sent {sent}, workers did {sorted(by_worker.values())};"
        f" links carried {sorted(watched.most.values())} at once of {LIMIT} ({watched.looks} looks)"
    )
