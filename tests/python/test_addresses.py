"""Addresses of brokers, result backends and databases: each has the same meaning as in kombu, Celery and SQLAlchemy, or is
refused, and none shows a password."""

import contextlib
import json
import socket
import struct
import subprocess
import threading
import uuid
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from celery import Celery

from proxy import Proxy
from support import Deployment, clean_environment, service, until


@pytest.fixture(scope="module")
def site(tmp_path_factory, bbcp, broker):
    deployment = Deployment(tmp_path_factory.mktemp("addresses"), bbcp, broker)
    yield deployment
    deployment.close()


def node(site, name):
    """A worker's name, unique because other tests use the same broker."""
    return f"{name}-{site.origin_site}@{socket.gethostname()}"


@contextlib.contextmanager
def stopped(worker):
    """A worker that is stopped afterwards, since the next one has the same queue."""
    try:
        yield worker
    finally:
        worker.stop()


def has_ipv6():
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def port_of(url):
    return urlsplit(url).port


def examined(site, check, **celery):
    """Doctor's finding in one check, and its whole output."""
    site.settings(celery=celery)
    done = site.cli("doctor", "--json", "--skip", "limits", check=False)
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    # The settings are refused.
    found = {finding["check"]: finding for finding in checks}
    return found.get(check) or found["settings"], done.stdout + done.stderr


@pytest.fixture(scope="module")
def socket_directory():
    with psycopg.connect(service("TEST_POSTGRES_URL")) as connection:
        (directory,) = connection.execute("SHOW unix_socket_directories").fetchone()
    assert directory
    return directory


@pytest.mark.parametrize(
    ("host", "verdict"),
    [
        ("127.0.0.1", "green"),
        ("[::ffff:127.0.0.1]", "green"),
        # The broker does not listen at this address; a connection to localhost would be wrong.
        ("[::ffff:127.0.0.2]", "red"),
        ("127.0.0.2", "red"),
        ("[fe80::1%25lo]", "red"),
    ],
)
def test_the_broker_is_at_the_host_of_the_url(site, host, verdict):
    if "[" in host and not has_ipv6():
        pytest.skip("this host has no IPv6")
    url = f"amqp://guest:guest@{host}:{port_of(service('TEST_AMQP_URL'))}//"
    finding, _ = examined(site, "broker", broker_url=url)
    assert finding["verdict"] == verdict, finding
    assert verdict == "red" or host.strip("[]") in finding["found"]


@pytest.mark.parametrize("scheme", ["amqp", "pyamqp", "librabbitmq", "PYAMQP"])
def test_urls_with_kombus_names_of_amqp(site, scheme):
    url = f"{scheme}://guest:guest@127.0.0.1:{port_of(service('TEST_AMQP_URL'))}/%2F"
    finding, _ = examined(site, "broker", broker_url=url)
    assert finding["verdict"] == "green", finding


def test_the_next_broker_of_a_list_is_used(site):
    """A worker gets its tasks from the second broker while the first one is unreachable; no password is shown."""
    first, second = f"s1{uuid.uuid4().hex}", f"s2{uuid.uuid4().hex}"
    user = f"u{uuid.uuid4().hex[:8]}"
    site.broker.ctl("add_user", user, second)
    site.broker.ctl("set_permissions", "-p", "/", user, ".*", ".*", ".*")
    port = port_of(service("TEST_AMQP_URL"))
    urls = f"amqp://a:{first}@127.0.0.1:1//;amqp://{user}:{second}@127.0.0.1:{port}//"
    try:
        finding, said = examined(site, "broker", broker_url=urls)
        assert finding["verdict"] == "yellow" and "127.0.0.1:1" in finding["found"], finding
        site.settings(celery={"broker_url": urls, "broker_connection_timeout": 30}, log={"level": "trace"})
        with stopped(site.worker(name="list")) as worker, site.app() as app:
            worker.says("connected to the next broker of the list")
            inspect = app.control.inspect([node(site, "list")], timeout=10, limit=1)
            stats = until(inspect.stats, "it answers", 60, log=worker.log)
            answers = json.dumps([stats, inspect.conf(), inspect.report()])
        (stats,) = stats.values()
        assert stats["broker"]["userid"] == user and stats["broker"]["port"] == port
        assert len(stats["broker"]["alternates"]) == 2
        for text in (said, answers, worker.log()):
            assert first not in text and second not in text
    finally:
        site.broker.ctl("delete_user", user)


def test_a_worker_reconnects_to_the_next_broker(site):
    """The connection to the first broker breaks and cannot be opened again: the worker uses the second broker."""
    direct = urlsplit(service("TEST_AMQP_URL"))
    first = Proxy("127.0.0.1", direct.port)
    urls = [f"amqp://guest:guest@127.0.0.1:{port}//" for port in (first.port, direct.port)]
    # A slow machine is no reason to turn to another broker.
    site.settings(celery={"broker_url": ";".join(urls), "broker_connection_timeout": 30})
    with contextlib.closing(first), stopped(site.worker(name="turns")) as worker, site.app() as app:

        def broker_port():
            inspect = app.control.inspect([node(site, "turns")], timeout=10, limit=1)
            stats = until(inspect.stats, "it answers", 60, log=worker.log)
            return stats[node(site, "turns")]["broker"]["port"]

        assert broker_port() == first.port, worker.log()
        first.pull()
        worker.says("connected to the next broker of the list", 60)
        assert broker_port() == direct.port, worker.log()
        result = app.send_task("nobodys.task", queue=site.queue)
        result.get(timeout=60, propagate=False)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://a:s3cret@h//;",
        "amqp://a:s3cret@h1//;amqp://b:s3cret@h2:x//",
        "amqp://a:s3cret/x@h//",
        "amqp://a:s3cret#x@h//",
        "amqp://a:1#s3cret@h//",
        "amqp://a:s3cret?x@h//",
        "amqp://a:s3cret;x@h//",
        "amqp://a:s3cret",
        "amqp://h//?s3cret=1",
        "a:s3cret@h//",
    ],
)
def test_urls_that_are_refused_are_not_shown(site, url):
    for key in ("broker_url", "result_backend"):
        site.settings(celery={key: url})
        for command in (["config", "check"], ["config", "check", "--json"], ["worker", "-Q", "x"], ["doctor", "--json"]):
            done = site.cli(*command, "--loglevel", "trace", check=False)
            said = done.stdout + done.stderr
            assert done.returncode != 0 and f"celery.{key}" in said, command
            assert "s3cret" not in said, command


def test_redis_database_from_the_db_parameter(site):
    """The parameter takes precedence over the path, as in Celery's backend."""
    address = service("TEST_REDIS_URL").rsplit("/", 1)[0]
    site.settings(celery={"result_backend": f"{address}/0?db=8"})
    app = Celery(broker=site.broker.url, backend=f"{address}/0?db=8", set_as_current=False)
    with stopped(site.worker(name="redis")), contextlib.closing(app):
        result = app.send_task("nobodys.task", queue=site.queue)
        result.get(timeout=20, propagate=False)
        with contextlib.closing(redis.Redis.from_url(f"{address}/8")) as there:
            assert there.exists(f"celery-task-meta-{result.id}")
        with contextlib.closing(redis.Redis.from_url(f"{address}/0")) as elsewhere:
            assert not elsewhere.exists(f"celery-task-meta-{result.id}")


@pytest.mark.parametrize(
    "form",
    [
        "db+postgresql://{user}@/ccat_ops_db?host={dir}&port={port}",
        "db+postgresql+psycopg2://{user}@:{port}/ccat_ops_db?host={dir}",
    ],
)
def test_results_by_a_unix_socket(site, socket_directory, form):
    url = urlsplit(service("TEST_POSTGRES_URL"))
    backend = form.format(user=url.username, dir=socket_directory, port=url.port)
    finding, _ = examined(site, "results", result_backend=backend)
    assert finding["verdict"] == "green" and socket_directory in finding["found"], finding


def test_the_ops_db_by_a_unix_socket(site, socket_directory):
    """A Unix socket is used without TLS, as in libpq."""
    url = urlsplit(service("TEST_POSTGRES_URL"))
    site.settings(
        ops_db={
            "database_type": "postgresql",
            "database_postgresql_database": "postgres",
            "database_postgresql_user": url.username,
            "database_postgresql_host": socket_directory,
            "database_postgresql_port": url.port,
            "database_postgresql_sslmode": "verify-full",
        }
    )
    done = site.cli("db", "status", check=False)
    assert "cannot connect" not in done.stderr, done.stderr


def test_pgpass_password_matches_its_host(site, tmp_path):
    """The password of the configured host, user and database is used, not the one of libpq's defaults."""
    pgpass = tmp_path / "pgpass"
    pgpass.touch(0o600)
    # A server that asks for a password and keeps what comes.
    with socket.create_server(("127.0.0.1", 0)) as server:
        pgpass.write_text(f"127.0.0.1:{server.getsockname()[1]}:ops:carl:s3cret\n")
        answered = []

        def serve():
            connection, _ = server.accept()
            with connection:
                size = struct.unpack("!i", connection.recv(4))[0]
                connection.recv(size - 4)
                connection.sendall(b"R" + struct.pack("!ii", 8, 3))  # the password in clear text
                answered.append(connection.recv(200))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        site.settings(
            ops_db={
                "database_type": "postgresql",
                "database_postgresql_database": "ops",
                "database_postgresql_user": "carl",
                "database_postgresql_host": "127.0.0.1",
                "database_postgresql_port": server.getsockname()[1],
                "database_postgresql_sslmode": "disable",
            }
        )
        subprocess.run(
            [service("CCAT_TRANSFER_BIN"), "--config", site.config, "db", "status"],
            env=clean_environment(PGPASSFILE=pgpass),
            capture_output=True,
            timeout=60,
        )
        until(lambda: answered, "the password was asked for")
    assert answered[0][5:].rstrip(b"\0") == b"s3cret"
