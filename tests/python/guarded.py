"""Private servers of a test that require a password, PostgreSQL also TLS: the shared ones accept every login."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psycopg
import redis

from support import until


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def openssl(folder, *words):
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)


def certificates(folder):
    """An authority and two certificates signed by it: a server's for `localhost`, a client's for user `ccat`."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other-ca"):
        openssl(
            folder,
            *("req", "-x509", *key, "-days", "2", "-subj", f"/CN=test {name}", "-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    for name, subject in (("server", "localhost"), ("client", "ccat")):
        (folder / "extensions").write_text(f"subjectAltName=DNS:{subject}\nextendedKeyUsage=serverAuth,clientAuth\n")
        openssl(folder, "req", *key, "-subj", f"/CN={subject}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(
            folder,
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
            *("-out", f"{name}.pem", "-extfile", "extensions"),
        )


@contextlib.contextmanager
def guarded_postgres(folder, password):
    """A PostgreSQL with TLS and a password; yields its port. User `plain` logs in without TLS, `ccat` only with TLS; user
    `carded` has a certificate instead of a password."""
    programs = Path(sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1])
    # PostgreSQL refuses to run as root.
    who = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        shutil.chown(folder, user.pw_uid, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, log = folder / "data", folder / "postgres.log"
    secret = folder / "initial"
    secret.write_text(password)
    secret.chmod(0o644)
    subprocess.run(
        [programs / "initdb", "--no-sync", "--auth=scram-sha-256", "--username=ccat", f"--pwfile={secret}"]
        + ["--encoding=UTF8", "--no-locale", "-D", data],
        **who, cwd=folder, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    secret.unlink()
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(folder / name, data / name)
        if who:
            shutil.chown(data / name, who["user"], who["group"])
        (data / name).chmod(0o600)
    (data / "pg_hba.conf").write_text(
        "hostssl all ccat 127.0.0.1/32 scram-sha-256\n"
        "hostssl all carded 127.0.0.1/32 cert map=cards\n"
        "hostnossl all plain 127.0.0.1/32 scram-sha-256\n"
    )
    (data / "pg_ident.conf").write_text("cards ccat carded\n")
    port = free_port()
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
            + ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "ssl=on", "-c", "ssl_cert_file=server.pem"]
            + ["-c", "ssl_key_file=server.key", "-c", "ssl_ca_file=ca.pem"],
            **who, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = {"host": "127.0.0.1", "port": port, "user": "ccat", "password": password, "dbname": "postgres"}

    def answers():
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(**address, autocommit=True)

    try:
        connection = until(answers, "PostgreSQL answers", 60)
        connection.execute("CREATE DATABASE ops")
        for user in ("plain", "carded"):
            connection.execute(f"CREATE ROLE {user} LOGIN SUPERUSER PASSWORD '{password}'")
        connection.close()
        yield port
    finally:
        # Immediate shutdown: the data are not needed any more.
        server.send_signal(signal.SIGQUIT)
        server.wait(30)


@contextlib.contextmanager
def guarded_redis(folder, password):
    """A Redis with a password; yields its port."""
    port = free_port()
    settings = folder / "redis.conf"
    settings.write_text(f"port {port}\nbind 127.0.0.1\nsave ''\nrequirepass {password}\ndir {folder}\n")
    server = subprocess.Popen(
        ["redis-server", settings], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers():
        assert server.poll() is None
        with contextlib.suppress(redis.ConnectionError):
            return redis.Redis(port=port, password=password).ping()

    try:
        until(answers, "Redis answers")
        yield port
    finally:
        server.terminate()
        server.wait(30)
