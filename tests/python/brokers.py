"""The brokers of the tests behind one interface: RabbitMQ, Redis, and a Redis server of one test.

A test that uses only the methods of `BrokerClient` runs on each of them.
"""

import contextlib
import json
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import amqp
import kombu
import redis
from amqp.exceptions import NotFound
from celery import Celery

from support import Process, held, service, until


class BrokerClient:
    """A broker as kombu sees it; each kind counts the messages of a queue in its own way (`unsettled`)."""

    #: Name in traces.
    system = "redis"

    #: True if a queue can have a second one for its rejected messages. Else they are deleted.
    has_dead_letters = False

    #: True if the broker itself drops a message whose time to live is over.
    has_message_ttl = False

    #: True if the messages have AMQP's texts and types.
    has_amqp = False

    #: True if the broker knows the number of consumers of a queue.
    counts_consumers = False

    #: True if a worker notices within seconds that no byte arrives any more.
    notices_silence = True

    @contextlib.contextmanager
    def channel(self):
        with kombu.Connection(self.url) as connection, connection.channel() as channel:
            yield channel

    @property
    def worker_settings(self):
        """Keys of [celery] for a worker that is killed."""
        return {f"broker_transport_options__{key}": value for key, value in self.transport_options.items()}

    def publish(self, queue, body, headers=None, **properties):
        """Publishes one message exactly as given."""
        with self.channel() as channel:
            self.send(channel, queue, body, headers, **properties)

    def get(self, queue):
        """Takes one message off a queue: (body decoded from JSON, headers, properties), or None."""
        with self.channel() as channel:
            message = channel.basic_get(queue, no_ack=True)
            if message is None:
                return None
            return json.loads(message.body), message.headers, self.properties(message)

    def properties(self, message):
        return message.properties

    def parked(self, queue):
        """Number of the queue's elements that no worker can read."""
        return 0

    def purge(self, queue):
        with self.channel() as channel:
            channel.queue_purge(queue)

    def all_settled(self, *queues):
        for queue in queues:
            until(lambda: self.unsettled(queue) == 0, f"{queue} is empty")

    def is_drained(self, queue):
        """Returns true if no message waits, or will return to the queue because its worker is dead."""
        return self.ready(queue) == 0

    @property
    def address(self):
        """Host and port."""
        url = urlsplit(self.url)
        return url.hostname, url.port

    def through(self, proxy):
        """The URL of the broker behind a proxy."""
        login, at, _ = urlsplit(self.url).netloc.rpartition("@")
        return urlsplit(self.url)._replace(netloc=f"{login}{at}127.0.0.1:{proxy.port}").geturl()

    def frozen(self):
        """Stops the server's processes meanwhile: no byte arrives, and no connection is closed."""
        return held([self.pid])


class Broker(BrokerClient):
    """The private RabbitMQ: its queues, raw messages, stop and start."""

    DEAD = "test-dead"
    system = "rabbitmq"
    has_dead_letters = has_message_ttl = has_amqp = counts_consumers = True
    # Heartbeats take minutes.
    notices_silence = False

    #: Options of the broker for workers that are killed.
    transport_options = {}

    def __init__(self):
        self.url = service("TEST_AMQP_URL")

    def _declared(self, queue):
        with self.channel() as channel:
            try:
                return channel.queue_declare(queue, passive=True)
            except NotFound:
                return None

    def ready(self, queue):
        """Number of messages that wait in a queue, without those that a worker holds."""
        declared = self._declared(queue)
        return declared.message_count if declared else 0

    def consumers(self, queue):
        declared = self._declared(queue)
        return declared.consumer_count if declared else 0

    def declare(self, queue):
        """Declares a queue like a Celery producer, and a second queue for rejected messages."""
        with self.channel() as channel:
            channel.exchange_declare(queue, "direct", durable=True, auto_delete=False)
            channel.queue_declare(queue, durable=True, auto_delete=False)
            channel.queue_bind(queue, queue, queue)
            channel.exchange_declare(self.DEAD, "direct", durable=True, auto_delete=False)
            channel.queue_declare(f"{queue}.dead", durable=True, auto_delete=False)
            channel.queue_bind(f"{queue}.dead", self.DEAD, queue)

    def publish_nested(self, queue, body, headers, depth):
        """Publishes a message with a header of as many lists, one in the other."""
        nested = []
        for _ in range(depth):
            nested = [nested]
        self.publish(queue, body, headers | {"x-nested": nested}, content_type="application/json")

    @staticmethod
    def send(channel, queue, body, headers=None, **properties):
        body = body.encode() if isinstance(body, str) else body
        message = amqp.Message(body, application_headers=headers or {})
        # Afterwards, since the constructor accepts only properties of the right types.
        message.properties.update(properties)
        channel.basic_publish(message, exchange="", routing_key=queue)

    @staticmethod
    def forward(channel, queue, message):
        """Publishes a message of py-amqp."""
        channel.basic_publish(message, exchange="", routing_key=queue)

    @staticmethod
    def broadcast(channel, body):
        """Sends a request to the remote control of all workers."""
        message = amqp.Message(body, content_type="application/json", content_encoding="utf-8")
        channel.basic_publish(message, exchange="celery.pidbox", routing_key="")

    def unsettled(self, queue):
        """Number of messages that wait or are held by a worker. Takes a second or two."""
        listed = self.ctl("list_queues", "-q", "--no-table-headers", "name", "messages")
        for line in listed.splitlines():
            name, _, count = line.rpartition("\t")
            if name == queue:
                return int(count)
        return 0

    def delete(self, queue):
        with self.channel() as channel:
            channel.queue_delete(queue)
            channel.queue_delete(f"{queue}.dead")
            channel.exchange_delete(queue)

    @staticmethod
    def ctl(*args):
        return subprocess.run(
            [service("RABBITMQCTL"), *args], check=True, capture_output=True, text=True, timeout=60
        ).stdout

    @staticmethod
    def power(action):
        """Starts, stops or restarts the broker; returns when it is done."""
        subprocess.run([service("TEST_RABBITMQ_CTL"), action], check=True, timeout=180)

    @property
    def pid(self):
        return int(Path(service("TEST_RABBITMQ_CTL")).with_name("pid").read_text())

    def close_connections(self):
        """Closes the connections of all workers. Their messages return to the queues."""
        self.ctl("close_all_connections", "a test closes the connections")

    def redeliver(self, queue):
        """Returns the messages that workers hold to their queue."""
        self.close_connections()


class RedisBroker(BrokerClient):
    """The private Redis as the broker, in the database of the results."""

    #: With these, a message of a worker that was killed returns soon. Python workers do not renew theirs.
    transport_options = {"visibility_timeout": 3, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}

    #: The lists of a queue, by class of priority.
    CLASSES = ("", "\x06\x163", "\x06\x166", "\x06\x169")

    def __init__(self, url=None):
        self.url = url or service("TEST_REDIS_URL")
        self.client = redis.Redis.from_url(self.url)

    def _lists(self, queue):
        return [queue + suffix for suffix in self.CLASSES]

    def ready(self, queue):
        return sum(self.client.llen(name) for name in self._lists(queue))

    def consumers(self, queue):
        """Number of workers that say that they consume a queue."""
        with Celery(broker=self.url, set_as_current=False) as app:
            nodes = app.control.inspect(timeout=0.5).active_queues() or {}
        return sum(queue in (active["name"] for active in queues) for queues in nodes.values())

    def declare(self, queue):
        """A queue needs no declaration."""

    def publish_nested(self, queue, body, headers, depth):
        """Publishes a message with a header of as many lists, one in the other. Python 3.13 cannot write it as JSON."""
        # First to a queue that no worker reads.
        self.publish(f"{queue}.flat", body, headers | {"x-nested": "NESTED"}, content_type="application/json")
        text = self.client.lpop(f"{queue}.flat").decode().replace(f"{queue}.flat", queue)
        assert '"NESTED"' in text
        self.client.lpush(queue, text.replace('"NESTED"', "[" * depth + "]" * depth))

    @staticmethod
    def send(channel, queue, body, headers=None, content_type=None, content_encoding=None, priority=0, **properties):
        message = channel.prepare_message(body, priority, content_type, content_encoding, headers or {}, properties)
        channel.basic_publish(message, exchange="", routing_key=queue)

    def forward(self, channel, queue, message):
        properties = dict(message.properties)
        self.send(channel, queue, message.body, properties.pop("application_headers", None), **properties)

    @staticmethod
    def broadcast(channel, body):
        message = channel.prepare_message(body, 0, "application/json", "utf-8", {}, {})
        channel.exchange_declare("celery.pidbox", "fanout")
        channel.basic_publish(message, exchange="celery.pidbox", routing_key="")

    def properties(self, message):
        return message.properties | {"content_type": message.content_type}

    def held_fields(self, queue):
        """Fields of the messages of a queue that workers hold. An entry of ours has the queue, one of Python's the route."""
        entries = {field: json.loads(entry) for field, entry in self.client.hgetall("unacked").items()}
        return [field for field, (_, exchange, key) in entries.items() if queue in (exchange, key)]

    def unsettled(self, queue):
        return self.ready(queue) + len(self.held_fields(queue))

    def is_drained(self, queue):
        # The messages of a dead worker return after the visibility timeout.
        return self.unsettled(queue) == 0

    def parked(self, queue):
        return self.client.llen(f"celery-worker.parked.{queue}")

    def delete(self, queue):
        self.client.delete(*self._lists(queue), f"celery-worker.parked.{queue}")

    def close_connections(self):
        """Closes the connections of our workers, which have a name. Their messages stay with them."""
        database = urlsplit(self.url).path.strip("/")
        for client in self.client.client_list():
            if client["name"] and client["db"] == database:
                self.client.client_kill_filter(_id=client["id"])

    def redeliver(self, queue):
        """Returns the messages that workers hold to their queue, as Python does after the visibility timeout."""
        with self.channel() as channel:
            for field in self.held_fields(queue):
                channel.qos.restore_by_tag(field.decode())


class RedisServer(RedisBroker):
    """A Redis server of its own, which a test can stop, freeze or fill. It keeps its data when it is restarted."""

    def __init__(self, directory, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        super().__init__(f"redis://127.0.0.1:{self.port}/0")
        self.directory = directory
        self.command = ["redis-server", "--port", self.port, "--dir", directory, "--save", "", *arguments]
        self.start()

    def start(self):
        self.process = Process(self.command, self.directory / "redis.log")
        until(self.answers, "Redis answers", log=self.process.log)

    def answers(self):
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            return self.client.ping()

    @property
    def pid(self):
        return self.process.pid

    def power(self, action):
        if action in ("stop", "restart"):
            self.stop()
        if action in ("start", "restart") and not self.process.running():
            self.start()

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.signal(signal.SIGCONT)
        self.process.stop()


#: Options of a server that loses nothing.
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
