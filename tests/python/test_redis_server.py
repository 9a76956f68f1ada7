"""Redis as the broker: connections, elements that are not messages, and a manager at a server that does not accept any."""

import json
import socket
import subprocess

import pytest

from brokers import RedisServer
from proxy import Proxy
from redis_site import app_of, nothing_is_held, queue_name
from support import TRANSFER, Deployment, backend_url, tasks_worker, until

pytestmark = pytest.mark.timeout(120)

BROKERS = ["redis"]


def test_what_is_no_message_is_kept_for_an_operator(deployment, broker):
    """It stops no worker; `ccat-transfer parked` shows it, returns it to the queue, and deletes it."""
    deployment.worker()
    for element in ("garbage", "[]", '{"body": ""}'):
        broker.client.lpush(deployment.queue, element)
    transfer = deployment.package()
    with deployment.app() as app:
        assert app.send_task(TRANSFER, [transfer], queue=deployment.queue).get(timeout=30) is None
    parked = lambda *arguments: json.loads(deployment.cli("--json", "parked", *arguments, deployment.queue))
    assert [element["text"] for element in parked("list")] == ["garbage", "[]", '{"body": ""}']
    assert "garbage" in deployment.cli("parked", "list", deployment.queue)
    assert parked("requeue")["elements"] == 3
    until(lambda: len(parked("list")) == 3, "the worker has parked them again")
    assert parked("delete")["elements"] == 3
    assert parked("list") == []
    nothing_is_held(broker)


def test_certificates_are_verified(tmp_path, run):
    """By default, and with an authority of our own; without verification only if the URL says so."""
    directory = tmp_path / "tls"
    directory.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = ["--tls-port", port, "--tls-cert-file", directory / "cert.pem", "--tls-key-file", directory / "key.pem"]
    server = RedisServer(directory, *tls, "--tls-auth-clients", "no")
    try:
        base = f"rediss://localhost:{port}/0"
        for url, is_trusted in {
            f"{base}?ssl_cert_reqs=none": True,
            f"{base}?ssl_ca_certs={directory}/cert.pem": True,
            base: False,
        }.items():
            server.url = url
            queue = queue_name()
            if is_trusted:
                log = run(tasks_worker, queue, server, "").log()
                assert ("certificate is not verified" in log) == ("none" in url)
                continue
            with pytest.raises(AssertionError, match="(?s)ended early.*certificate"):
                run(tasks_worker, queue, server, "", broker_connection_retry_on_startup="false")
    finally:
        server.process.stop()


def test_a_unix_socket(tmp_path, run):
    directory = tmp_path / "redis"
    directory.mkdir()
    server = RedisServer(directory, "--unixsocket", directory / "s")
    try:
        server.url = f"redis+socket://{directory}/s?virtual_host=2"
        queue = queue_name()
        run(tasks_worker, queue, server, backend_url("redis"))
        with app_of(server, backend_url("redis")) as app:
            assert app.send_task("tasks.add", [1, 2], queue=queue).get(timeout=20) == 3
            assert app.control.ping(timeout=1)
    finally:
        server.stop()


def test_a_lost_reply_publishes_no_message_twice(deployment, broker):
    """The connection of a manager ends after Redis has a message, and before the manager knows it."""
    transfers = [deployment.package(size=1) for _ in range(20)]
    proxy = Proxy(*broker.address)
    # The reply of the script that publishes.
    proxy.lose_replies(b"celery-worker.published", b":1\r\n", 3)
    try:
        deployment.cli("manager", "--once", CELERY_BROKER_URL=broker.through(proxy))
    finally:
        proxy.close()
    assert proxy.losses == 3
    assert {deployment.status(transfer) for transfer in transfers} == {"SCHEDULED"}
    sent = [body[1]["data_transfer_id"] for body, _, _ in iter(lambda: broker.get(deployment.queue), None)]
    assert sorted(sent) == sorted(transfers)


def test_a_manager_at_a_full_server(tmp_path, bbcp, server):
    """A row is SCHEDULED only if its message exists."""
    directory = tmp_path / "site"
    directory.mkdir()
    deployment = Deployment(directory, bbcp, server)
    try:
        transfers = [deployment.package(size=1) for _ in range(5)]
        server.client.config_set("maxmemory", 1)
        done = deployment.cli("manager", "--once", check=False)
        assert "nothing is published until the broker has memory again" in done.stderr, done.stderr
        assert '"refused":5' in done.stderr
        assert {deployment.status(transfer) for transfer in transfers} == {"PENDING"}
        assert server.ready(deployment.queue) == 0
        server.client.config_set("maxmemory", 0)
        deployment.schedule()
        assert {deployment.status(transfer) for transfer in transfers} == {"SCHEDULED"}
        assert server.ready(deployment.queue) == len(transfers)
    finally:
        deployment.close()


#: Texts on a channel, or elements of a list, that kombu does not write.
STRANGE = ["garbage", "[]", "{}", "null", "7", '{"body": ""}', '{"properties": {}}', "[" * 5000, '{"a":' * 5000, "\x00", '"\\ud800"']


def test_strange_elements_and_requests(server, run):
    """The worker lives, nothing strange is recorded, and what follows is run and answered."""
    queue = queue_name()
    worker = run(tasks_worker, queue, server, server.url)
    with app_of(server) as app:
        for text in STRANGE:
            server.client.publish("/0.celery.pidbox", text)
            server.client.lpush(queue, text)
        server.client.lpush(queue, b"\xff\xfe")
        assert app.send_task("tasks.add", [1, 1], queue=queue).get(timeout=20) == 2
        assert app.control.ping(timeout=2)
    until(lambda: server.parked(queue) == len(STRANGE) + 1, "they are parked")
    assert worker.running() and "no connection to the broker" not in worker.log()
    nothing_is_held(server)


@pytest.fixture
def site(tmp_path, bbcp, server):
    """A deployment with a Redis of its own as the broker."""
    directory = tmp_path / "site"
    directory.mkdir()
    deployment = Deployment(directory, bbcp, server)
    yield deployment
    server.power("start")
    server.client.config_set("requirepass", "")
    deployment.close()


def examine(site):
    """The findings of the doctor about the broker: (verdict, text) by check; the other findings are green."""
    done = site.cli("doctor", "--json", check=False)
    findings = json.loads(done.stdout)["checks"]
    assert {one["verdict"] for one in findings if one["check"] not in ("broker", "permissions", "queues")} == {"green"}
    return {one["check"]: (one["verdict"], f"{one['found']} {one['advice']}") for one in findings}


def test_the_doctor_examines_the_server(site, server):
    findings = json.loads(site.cli("doctor", "--json", check=False).stdout)["checks"]
    assert ("clock", "broker", "green") in {(one["check"], one["subject"], one["verdict"]) for one in findings}
    assert {verdict for verdict, _ in examine(site).values()} == {"green"}
    for option, bad, good, says in (
        ("maxmemory-policy", "allkeys-lru", "noeviction", "maxmemory-policy noeviction"),
        ("appendonly", "no", "yes", "its restart loses all messages"),
    ):
        server.client.config_set(option, bad)
        verdict, text = examine(site)["broker"]
        assert verdict == "yellow" and says in text
        server.client.config_set(option, good)
    server.client.lpush("celery-worker.parked." + site.queue, "garbage")
    verdict, text = examine(site)["queues"]
    assert verdict == "yellow" and f"parked list {site.queue}" in text


def test_the_doctor_examines_the_login(site, server):
    # Without the right to publish on a channel.
    server.client.execute_command("ACL", "SETUSER", "weak", "on", ">secret", "~*", "&*", "+@all", "-publish")
    site.settings(celery={"broker_url": server.url.replace("//", "//weak:secret@")})
    verdict, text = examine(site)["permissions"]
    # The texts of Redis 7 and 8 differ.
    assert verdict == "red" and "script" in text and "ACL SETUSER" in text
    server.client.config_set("requirepass", "secret")
    site.settings(celery={"broker_url": server.url.replace("//", "//:wrong@")})
    findings = examine(site)
    assert findings["broker"][0] == "red" and "user and password" in findings["broker"][1]
    assert findings["queues"][0] == "skipped"
    server.power("stop")
    verdict, text = examine(site)["broker"]
    assert verdict == "red" and "start Redis" in text
