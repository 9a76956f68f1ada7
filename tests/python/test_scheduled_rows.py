"""No row waits for a message that does not exist: SCHEDULED is written with a message, and a lost message is sent again."""

import json
import signal
from urllib.parse import urlsplit

from proxy import Proxy
from support import MB, TRANSFER, until


def through(broker, proxy):
    """The broker's address behind a proxy."""
    url = urlsplit(broker.url)
    return url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{proxy.port}").geturl()


def test_a_stop_behind_a_dead_connection(deployment, broker):
    """The worker has not noticed that its connection is gone; another one has acknowledged the message."""
    url = urlsplit(broker.url)
    proxy = Proxy(url.hostname, url.port)
    deployment.double(RATE=MB)
    transfer = deployment.package(size=60 * MB)
    worker = deployment.worker(CELERY_BROKER_URL=through(broker, proxy))
    try:
        with deployment.app() as app:
            app.send_task(TRANSFER, [transfer], queue=deployment.queue)
            deployment.mid_copy()
            proxy.pull(silently=True)
            broker.ctl("close_all_connections", "a test cuts the connection")
            until(lambda: broker.ready(deployment.queue) == 1, "the message is back in its queue")
            other = deployment.worker(name="other")
            other.says("held_by_other")
            other.says("task ignored")
            other.stop()
        assert broker.unsettled(deployment.queue) == 0
        worker.signal(signal.SIGQUIT)
        until(lambda: not deployment.leases(), "the row is given back")
        # It would still wait for the broker to answer its goodbye.
        worker.kill()
    finally:
        proxy.close()
    assert deployment.status(transfer) == "PENDING"
    deployment.double()
    deployment.schedule()
    deployment.worker(name="next")
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)


def test_a_full_queue_costs_the_others_nothing(deployment, broker):
    """`x-overflow=reject-publish`: refusals count for their own queue, and confirmed messages are never sent twice."""
    other = f"{deployment.destination_site}_buffer_data_transfer"
    broker.declare(other)
    policy = {"max-length": 1, "overflow": "reject-publish"}
    name = f"full-{deployment.queue}"
    broker.ctl("set_policy", "--priority", "9", name, f"^{deployment.queue}$", json.dumps(policy))
    try:
        until(lambda: _is_full(broker, deployment.queue), "the queue is full")
        refused = [deployment.package(size=1) for _ in range(4)]
        good = [_back(deployment) for _ in range(4)]
        for _ in range(3):
            deployment.cli("manager", "--once", check=False)
        assert broker.ready(other) == len(good)
        assert {deployment.status(transfer) for transfer in good} == {"SCHEDULED"}
        assert {deployment.status(transfer) for transfer in refused} == {"PENDING"}
    finally:
        broker.ctl("clear_policy", name)
        broker.delete(other)
    until(lambda: not _is_full(broker, deployment.queue), "the queue takes messages")
    deployment.schedule()
    assert {deployment.status(transfer) for transfer in refused} == {"SCHEDULED"}


def _is_full(broker, queue):
    """Publishes a message that is no task, and says whether the broker refuses it."""
    import kombu

    with kombu.Connection(broker.url, transport_options={"confirm_publish": True}) as connection:
        try:
            connection.Producer().publish(b"x", exchange="", routing_key=queue, retry=False)
        except Exception:  # noqa: BLE001 # the class depends on py-amqp's version
            return True
    return False


def _back(deployment):
    """A transfer in the other direction."""
    name = f"back-{len(deployment.rows('SELECT id FROM data_transfer'))}.tar"
    (deployment.destination / name).write_bytes(b"x")
    printed = deployment.cli(
        *("--json", "transfers", "create", "--package", name),
        *("--from", f"{deployment.destination_site}/buffer", "--to", f"{deployment.origin_site}/buffer"),
    )
    return json.loads(printed)["id"]
