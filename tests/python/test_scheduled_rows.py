"""No row waits for a message that does not exist: SCHEDULED is written with a message, and a lost message is sent again."""

import json
import re
import signal

import amqp
import pytest

from proxy import Proxy
from support import EXPIRED, MB, TRANSFER, Process, clean_environment, service, until

BROKERS = ["rabbitmq", "redis"]


def test_a_stop_behind_a_dead_connection(deployment, broker):
    """The worker has not noticed the loss of its connection; another one has acknowledged the message."""
    proxy = Proxy(*broker.address)
    deployment.double(RATE=MB)
    transfer = deployment.package(size=60 * MB)
    worker = deployment.worker(CELERY_BROKER_URL=broker.through(proxy))
    try:
        with deployment.app() as app:
            app.send_task(TRANSFER, [transfer], queue=deployment.queue)
            deployment.mid_copy()
            proxy.pull(silently=True)
            broker.redeliver(deployment.queue)
            until(lambda: broker.ready(deployment.queue) == 1, "the message is back in its queue")
            other = deployment.worker(name="other")
            other.says("held_by_other")
            other.says("task ignored")
            other.stop()
        assert broker.unsettled(deployment.queue) == 0
        worker.signal(signal.SIGQUIT)
        until(lambda: not deployment.leases(), "the row is given back")
        # The worker would wait until the broker closes its connection.
        worker.kill()
    finally:
        proxy.close()
    assert deployment.status(transfer) == "PENDING"
    deployment.double()
    deployment.schedule()
    deployment.worker(name="next")
    deployment.reaches(transfer, "COMPLETED")
    deployment.assert_moved(transfer)


@pytest.mark.rabbitmq("x-overflow")
def test_a_full_queue_does_not_delay_the_others(deployment, broker):
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
    """Publishes a message that is not a task; returns true if the broker refuses it."""
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


def _schedule_by_hand(deployment, transfer):
    """Sets a row to SCHEDULED like another program or an operator."""
    deployment.execute("UPDATE data_transfer SET status = 'SCHEDULED' WHERE id = ?", transfer)


def _reason(deployment, transfer):
    return deployment.row(transfer)["failure_error_message"]


def test_a_message_that_is_not_run_changes_its_row(deployment, broker):
    """Revoked by id and by stamp, expired, and with wrong arguments: the row leaves SCHEDULED with its message."""
    deployment.double(RATE=4 * MB)
    deployment.settings(celery={"worker_prefetch_multiplier": 16})
    running = deployment.package(size=16 * MB)
    by_id, by_stamp, expired, wrong, other = (deployment.package() for _ in range(5))
    worker = deployment.worker(concurrency=1)
    with deployment.app() as app:
        app.send_task(TRANSFER, [running], queue=deployment.queue)
        deployment.mid_copy()
        for transfer in (by_id, by_stamp, expired, wrong, other):
            _schedule_by_hand(deployment, transfer)
        revoked = app.send_task(TRANSFER, [by_id], queue=deployment.queue)
        stamps = {"stamped_headers": ["batch"], "stamps": {"batch": ["x"]}}
        app.send_task(TRANSFER, kwargs={"data_transfer_id": by_stamp}, queue=deployment.queue, headers=stamps)
        late = app.send_task(TRANSFER, [expired], queue=deployment.queue, expires=1)
        bad = app.send_task(TRANSFER, [wrong], {"bogus": 1}, queue=deployment.queue)
        app.send_task(TRANSFER, [other], queue=deployment.queue)
        until(lambda: broker.ready(deployment.queue) == 0, "the worker holds all of them")
        app.control.revoke(revoked.id)
        app.control.broadcast("revoke_by_stamped_headers", arguments={"headers": {"batch": ["x"]}})
        worker.says("tasks revoked by stamped headers")
        for transfer in (by_id, by_stamp):
            deployment.reaches(transfer, "FAILED")
            reason = _reason(deployment, transfer)
            assert "revoked by an operator through remote control" in reason
            assert f"transfers retry {transfer}" in reason
        for transfer in (expired, wrong):
            deployment.reaches(transfer, "PENDING")
        deployment.reaches(other, "COMPLETED")
        for task, state in ((revoked, "REVOKED"), (late, "REVOKED"), (bad, "FAILURE")):
            until(lambda task=task, state=state: task.state == state, f"{task.id} is {state}")
    broker.all_settled(deployment.queue)
    assert {deployment.row(transfer)["retry_count"] for transfer in (by_id, by_stamp, expired, wrong)} == {0}
    # The other transfers run as usual.
    deployment.cli("transfers", "retry", by_id)
    deployment.schedule()
    for transfer in (by_id, expired, wrong):
        deployment.reaches(transfer, "COMPLETED")
        deployment.assert_moved(transfer)


def test_a_revoked_duplicate_leaves_the_row_alone(deployment, broker):
    """The row's own message is another one, which has not been delivered yet."""
    transfer = deployment.package()
    deployment.schedule()
    message = broker.get(deployment.queue)
    worker = deployment.worker()
    with deployment.app() as app:
        app.send_task(TRANSFER, [transfer], queue=deployment.queue, task_id="an-old-one", **EXPIRED)
        worker.says("task was revoked or has expired; it does not run")
        broker.all_settled(deployment.queue)
    assert deployment.status(transfer) == "SCHEDULED"
    assert message[1]["id"] == deployment.rows("SELECT task_id FROM transfer_worker_schedule")[0]["task_id"]


def _lose_by_purge(broker, queue):
    broker.purge(queue)


def _lose_by_delete(broker, queue):
    broker.delete(queue)


def _lose_by_dead_letter(broker, queue):
    with broker.channel() as channel:
        channel.basic_reject(channel.basic_get(queue).delivery_tag, requeue=False)


def _lose_by_expiry(broker, queue):
    """Loses a message like one that was sent with a time to live."""
    if not broker.has_message_ttl:
        return _lose_by_purge(broker, queue)
    with broker.channel() as channel:
        message = channel.basic_get(queue, no_ack=True)
        short_lived = amqp.Message(message.body, expiration="1", **message.properties)
        channel.basic_publish(short_lived, exchange="", routing_key=queue)
    return until(lambda: broker.ready(queue) == 0, "the message has expired")


def _lose_at_a_dead_worker(broker, queue):
    """Loses a message at a worker that acknowledges early and is killed."""
    assert broker.get(queue)


LOSSES = [_lose_by_purge, _lose_by_delete, _lose_by_dead_letter, _lose_by_expiry, _lose_at_a_dead_worker]


def test_a_lost_message_is_sent_again(deployment, broker):
    """Rows without a message, for all causes: a manager finds them, and they become COMPLETED or FAILED with a reason."""
    deployment.settings(manager={"sleep_time": "500ms", "reconcile_after": "2s"})
    rows = {}
    for lose in LOSSES:
        rows[lose.__name__] = deployment.package()
        deployment.schedule()
        until(lambda: broker.ready(deployment.queue) == 1, "its message is there")
        lose(broker, deployment.queue)
    # A purge of the successor of the deleted queue has no effect: each row has already lost its own message.
    assert {deployment.status(transfer) for transfer in rows.values()} == {"SCHEDULED"}
    for name in ("by hand", "Python's manager", "expired", "of no package"):
        rows[name] = deployment.transfer_of_nothing() if name == "of no package" else deployment.package()
        _schedule_by_hand(deployment, rows[name])
    deployment.worker()
    manager = _manager(deployment)
    with deployment.app() as app:
        # Python's manager sends by its own client; this message exists.
        app.send_task(TRANSFER, [rows["Python's manager"]], queue=deployment.queue)
        app.send_task(TRANSFER, [rows["expired"]], queue=deployment.queue, expires=-10)
    for name, transfer in rows.items():
        if name == "of no package":
            deployment.reaches(transfer, "FAILED")
            assert _reason(deployment, transfer)
        else:
            deployment.reaches(transfer, "COMPLETED")
            deployment.assert_moved(transfer)
    assert deployment.leases() == []
    assert deployment.rows("SELECT * FROM transfer_worker_schedule") == []
    assert "its message is lost; it is sent again" in manager.log()
    assert len(deployment.copies()) == len(rows) - 1, "each was copied once"


def test_a_message_at_a_busy_worker_is_not_lost(deployment, broker):
    """A worker reports the messages that it holds, and they are not sent again."""
    deployment.double(RATE=2 * MB)
    deployment.settings(
        celery={"worker_prefetch_multiplier": 4}, manager={"sleep_time": "200ms", "reconcile_after": "300ms"}
    )
    transfers = [deployment.package(size=6 * MB) for _ in range(3)]
    deployment.worker(concurrency=1)
    manager = _manager(deployment)
    deployment.mid_copy()
    looked = re.compile('"overdue":[12]')
    until(lambda: len(looked.findall(manager.log())) > 1, "they are looked for again and again", log=manager.log)
    for transfer in transfers:
        deployment.reaches(transfer, "COMPLETED")
    broker.all_settled(deployment.queue)
    assert "its message is lost" not in manager.log()


def _manager(deployment):
    manager = Process(
        [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "manager"],
        deployment.directory / "manager.log",
        cwd=deployment.directory,
        env=clean_environment(),
    )
    deployment.processes.append(manager)
    return manager.says("manager ready")
