"""The keys and messages of Redis as the broker are those of kombu: programs of both kinds read and write the same ones."""

import base64
import contextlib
import json
import re
import subprocess
import uuid
from pathlib import Path

import msgpack
import pytest
from kombu import Exchange, Queue

from redis_site import app_of, held, is_running, nothing_is_held, options, queue_name
from support import TRANSFER, clean_environment, python_worker, service, tasks_worker, until
from test_control import celery, events, node_of

pytestmark = pytest.mark.timeout(120)

BROKERS = ["redis"]

#: The keys of our worker that kombu does not have: markers of publications.
OURS = "celery-worker."


def keys(server):
    return {key.decode() for key in server.client.keys()}


def push(server, queue, body, encoding=None, content_type="application/json", **headers):
    """Writes a message that has only the fields that Python needs; returns the task's id."""
    task_id = str(uuid.uuid4())
    properties = {
        "delivery_info": {"exchange": "", "routing_key": queue},
        "delivery_tag": str(uuid.uuid4()),
        "correlation_id": task_id,
    }
    if encoding:
        properties["body_encoding"] = encoding
    message = {
        "body": body,
        "content-type": content_type,
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": "tasks.echo", "id": task_id} | headers,
        "properties": properties,
    }
    server.client.lpush(queue, json.dumps(message))
    return task_id


def test_bodies_in_all_encodings(server, run):
    queue = queue_name()
    run(tasks_worker, queue, server, server.url, accept_content='["json", "msgpack"]')
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    text = json.dumps([["é"], {}, embed])
    packed = base64.b64encode(msgpack.packb([["é"], {}, embed])).decode()
    sent = [
        push(server, queue, text),
        push(server, queue, text, "utf-8"),
        push(server, queue, text, "UTF-8"),
        push(server, queue, base64.b64encode(text.encode()).decode(), "base64"),
        push(server, queue, packed, "base64", "application/x-msgpack"),
    ]
    with app_of(server) as app:
        assert [app.AsyncResult(task_id).get(timeout=20) for task_id in sent] == ["é"] * len(sent)
    nothing_is_held(server)


def test_python_sees_our_messages_like_its_own(server, run):
    """The fields of requests and events at a Python worker, and those of the messages, do not depend on the producer."""
    queue = queue_name()
    with app_of(server, task_default_queue=queue) as app, events_of_python(server, run, queue, app) as (seen, node):
        blocking = app.send_task("tasks.sleep", [4], queue=queue)
        until(lambda: is_running(blocking), "the worker is busy")
        theirs = app.send_task(TRANSFER, kwargs={"data_transfer_id": 42}, queue=queue).id
        ours = enqueue(server, queue)
        reserved = until(lambda: requests(app, node, {ours, theirs}), "both wait at the worker")
        assert shape(reserved[ours]) == shape(reserved[theirs])
        received = lambda task: [event for event in list(seen) if event["type"] == "task-received" and event["uuid"] == task]
        until(lambda: received(ours) and received(theirs), "both were received")
        assert shape(received(ours)[0]) == shape(received(theirs)[0])
        for task in (ours, theirs):
            assert app.AsyncResult(task).get(timeout=20) is None
    waiting = queue_name()
    with app_of(server) as app:
        app.send_task(TRANSFER, kwargs={"data_transfer_id": 42}, queue=waiting)
        enqueue(server, waiting)
        enqueue(server, waiting)
    again, ours, theirs = map(json.loads, server.client.lrange(waiting, 0, -1))
    assert set(ours["headers"]) >= set(theirs["headers"])
    # Without a result backend our client expects no reply.
    assert set(ours["properties"]) >= set(theirs["properties"]) - {"reply_to"}
    assert set(ours) == set(theirs) and ours["properties"]["delivery_info"] == theirs["properties"]["delivery_info"]
    assert again["properties"]["delivery_tag"] != ours["properties"]["delivery_tag"]
    nothing_is_held(server)


@contextlib.contextmanager
def events_of_python(server, run, queue, app):
    """Events of a Python worker that runs one task at a time, and its name."""
    node = f"peer-{queue}@celery"
    run(python_worker, queue, server, server.url, "-E", "-c", "1", "-n", node, "--prefetch-multiplier", "4", pool="prefork")
    with events(app) as seen:
        yield seen, node


def enqueue(server, queue):
    """Sends a task by the example in Rust; returns its id."""
    program = Path(service("CCAT_TRANSFER_BIN")).parent / "examples" / "enqueue"
    done = subprocess.run(
        [program, "transfer_files_bbcp", "--id", "42", "--queue", queue],
        env=clean_environment(CELERY_BROKER_URL=server.url),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    return done.stdout.split()[0]


def requests(app, node, ids):
    """The requests of tasks that wait at a worker, once it has all of them."""
    answer = (app.control.inspect([node], timeout=2).reserved() or {}).get(node, [])
    found = {request["id"]: request for request in answer}
    return found if ids <= set(found) else None


def shape(value):
    """Keys and types."""
    return {key: type(one).__name__ for key, one in value.items()}


def test_answers_leave_nothing_behind(server, run):
    """The lists of replies are gone, or expire; a client that is gone gets no list."""
    queue = queue_name()
    worker = run(tasks_worker, queue, server, server.url)
    for command in (("inspect", "ping"), ("status",)):
        assert node_of(worker) in celery(server, *command)
    with app_of(server) as app:
        # One client that dies before it reads the reply, and one that has removed its binding.
        for ticket, is_bound in (("dead", True), ("gone", False)):
            reply_to = {"exchange": "reply.celery.pidbox", "routing_key": ticket}
            if is_bound:
                sep = "\x06\x16"
                server.client.sadd("_kombu.binding.reply.celery.pidbox", f"{ticket}{sep}{sep}{ticket}.reply.celery.pidbox")
            with app.connection() as connection, connection.channel() as channel:
                app.control.mailbox(connection).exchange(channel).declare()
                producer = connection.Producer(channel)
                request = {"method": "ping", "arguments": {}, "destination": None, "ticket": ticket, "reply_to": reply_to}
                producer.publish(request, exchange="celery.pidbox", serializer="json")
        until(lambda: server.client.exists("dead.reply.celery.pidbox"), "the worker has answered")
        assert app.control.ping(timeout=1)
    assert 0 < server.client.ttl("dead.reply.celery.pidbox") <= 60
    replies = {key for key in keys(server) if key.endswith("reply.celery.pidbox") and not key.startswith("_kombu")}
    assert replies == {"dead.reply.celery.pidbox"}


def test_a_python_worker_learns_what_is_revoked(server, run):
    queue = queue_name()
    ours = run(tasks_worker, queue, server, server.url)
    revoked = str(uuid.uuid4())
    with app_of(server) as app:
        app.control.revoke(revoked, reply=True, timeout=2)
        peer = run(python_worker, queue_name(), server, server.url, mingle=True)
        peer.says("sync with 1 nodes")
        name = re.search(r"peer-\w+@\S+", peer.log())[0]
        assert revoked in until(lambda: app.control.inspect([name], timeout=2).revoked(), "it answers")[name]
    assert ours.running()


@pytest.mark.parametrize("fanout", [{"fanout_prefix": False}, {"fanout_patterns": False}], ids=lambda fanout: [*fanout][0])
def test_channels_by_other_names(server, run, fanout):
    """Events of both kinds of workers, remote control, and a Python worker that looks for its neighbours."""
    queue, other = queue_name(), queue_name()
    transport = {"broker_transport_options": fanout}
    run(tasks_worker, queue, server, server.url, **options(fanout))
    peer = run(python_worker, other, server, server.url, "-E", settings=transport, gossip=True, asks=False)
    peer.says("ready.", 60)
    with app_of(server, **transport) as app, events(app) as seen:
        nodes = lambda kind: {event["hostname"].split("@")[0] for event in list(seen) if event["type"] == kind}
        until(lambda: nodes("worker-heartbeat") >= {f"tasks-{queue}", f"peer-{other}"}, "both send heartbeats")
        replies = until(lambda: len(found := app.control.ping(timeout=1)) == 2 and found, "both answer")
        assert len(replies) == 2
        assert app.send_task("tasks.add", [1, 1], queue=queue).get(timeout=20) == 2
        until(lambda: f"tasks-{queue}" in nodes("task-succeeded"), "its events have come")
        late = run(tasks_worker, queue_name(), server, server.url, **options(fanout))
        if fanout != {"fanout_patterns": False}:
            # Without patterns Python cannot tell the events of workers from others, and ignores them.
            peer.says(f"sync with {node_of(late)}")
        late.signal(15)
        late.ended()
        until(lambda: node_of(late).split("@")[0] in nodes("worker-offline"), "it says goodbye")


NAMES = {
    "global_keyprefix": "P:",
    "sep": ":",
    "priority_steps": [0, 5],
    "unacked_key": "u",
    "unacked_index_key": "ui",
    "unacked_mutex_key": "um",
}


def test_keys_by_other_names(server, run):
    """Both workers read and write the same keys, while they hold messages and when they have returned them."""
    transport = {"broker_transport_options": NAMES}
    seen = {}
    with app_of(server, **transport) as app:
        for kind, start, more in (
            ("python", python_worker, {"settings": transport, "asks": False}),
            ("rust", tasks_worker, {**options(NAMES), "task_acks_late": "true"}),
        ):
            server.client.flushdb()
            queue = queue_name()
            # The priorities of these have different classes.
            results = [app.send_task("tasks.add", [1, 1], queue=queue, priority=priority) for priority in (0, 4, 5, 9)]
            assert {f"P:{queue}", f"P:{queue}:5"} <= keys(server)
            worker = run(start, queue, server, server.url, **more)
            assert [result.get(timeout=30) for result in results] == [2] * 4
            app.send_task("tasks.add", [1, 1], queue=queue, countdown=600, priority=7)
            until(lambda: server.client.hlen("P:u") == server.client.zcard("P:ui") == 1, "it is held")
            mine = lambda: {
                (name.replace(queue, "Q"), server.client.type(name).decode())
                for name in keys(server)
                if not re.search(rf"celery-task-meta|{OURS}|pidbox|celeryev", name)
            }
            while_held = mine()
            (entry,) = map(json.loads, server.client.hvals("P:u"))
            worker.signal(15)
            worker.ended(30)
            assert [(lst, server.client.llen(f"P:{queue}{lst}")) for lst in ("", ":5")] == [("", 0), (":5", 1)]
            message = json.loads(server.client.lindex(f"P:{queue}:5", 0))
            flags = message["headers"]["redelivered"], message["properties"]["delivery_info"]["redelivered"]
            seen[kind] = while_held, len(entry), mine(), flags, shape(message["properties"])
    assert seen["rust"] == seen["python"]


ROUTES = {
    "direct": (Exchange("files", "direct"), "images", "images"),
    "topic": (Exchange("things", "topic"), "sky.*.raw", "sky.east.raw"),
}


@pytest.mark.parametrize("kind", ROUTES)
def test_exchanges(server, run, kind):
    """The bindings are those of a Python worker, and a message reaches each of two queues; one that a dead worker held
    returns to its own queue only."""
    exchange, binding, key = ROUTES[kind]
    one, two = queue_name(), queue_name()
    queues = [Queue(name, exchange, routing_key=binding) for name in (one, two)]
    with app_of(server) as app:
        with app.connection() as connection, connection.channel() as channel:
            for queue in queues:
                queue(channel).declare()
        members = {table: server.client.smembers(f"{table}.{exchange.name}") for table in ("_kombu.binding", "_kombu.binding_permanent")}
        assert all(len(found) == 2 for found in members.values())
        server.client.flushdb()

        def ours(name):
            table = f'{{{name} = {{exchange = "{exchange.name}", exchange_type = "{kind}", routing_key = "{binding}"}}}}'
            return run(tasks_worker, name, server, server.url, task_queues=table, **options())

        workers = [ours(name) for name in (one, two)]
        assert members == {table: server.client.smembers(f"{table}.{exchange.name}") for table in members}
        with app.connection() as connection, connection.channel() as channel:
            # A producer that does not know the type of an exchange takes it for a direct one.
            exchange(channel).declare()
            producer = connection.Producer(channel)
            result = app.send_task("tasks.sleep", [3], exchange=exchange.name, routing_key=key, producer=producer)
        until(lambda: held(server) == (2, 2), "each has a message")
        workers[0].kill()
        next_worker = ours(one)
        next_worker.says('"task succeeded"', 30)
        assert result.get(timeout=20) == 3
        nothing_is_held(server)
        assert [worker.log().count('"task received"') for worker in (workers[1], next_worker)] == [1, 1]


def test_unread_results_of_rpc_expire(server, run):
    """A client in Python reads its result; the list of one that does not has a lifetime, as the queue has with RabbitMQ."""
    queue = queue_name()
    run(tasks_worker, queue, server, "rpc://", result_expires="3600")
    with app_of(server, "rpc://") as app:
        assert app.send_task("tasks.add", [1, 2], queue=queue).get(timeout=20) == 3
    with app_of(server, "rpc://") as app:
        unread = app.thread_oid
        app.send_task("tasks.add", [1, 2], queue=queue)
        until(lambda: server.client.llen(unread), "the result is there")
        assert 0 < server.client.ttl(unread) <= 3600
