"""The status page: its data as JSON, on both databases, and what it refuses."""

import contextlib
import http.client
import json
import os
import random
import subprocess
import urllib.parse
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from proxy import Proxy
from support import MB, REPO, Process, clean_environment, service, until
from variants import OnPostgres, OwnBbcp

pytestmark = pytest.mark.timeout(120)

BROKERS = ["redis"]

#: A file name that is a page, a query, a shell command and a terminal command at once.
HOSTILE = "<script>alert(1)</script>' OR 1=1; $(reboot) \u202e\u001b[31m%00.tar"

TOKEN = "0123456789abcdef0123456789abcdef"

#: Every resource of the API that needs no id.
RESOURCES = ["overview", "links", "problems", "programs", "throughput", "transfers", "openapi.json"]


class Page:
    """`ccat-transfer web`."""

    def __init__(self, deployment, *flags, **environment):
        self.process = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", deployment.config, "web", "--listen", "127.0.0.1:0", *flags],
            deployment.directory / f"web-{uuid.uuid4().hex[:8]}.log",
            cwd=deployment.directory,
            env=clean_environment(**environment),
        )
        deployment.processes.append(self.process)
        self.process.says("status page open")
        said = next(json.loads(line) for line in self.process.log().splitlines() if "status page open" in line)
        self.url = urllib.parse.urlsplit((said.get("fields") or said)["url"])

    def ask(self, path, method="GET", **headers):
        """Status, headers and body."""
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def api(self, resource, expected=200, **parameters):
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        found, headers, body = self.ask(f"/api/v1/{resource}{query}")
        assert found == expected, (resource, parameters, body)
        assert headers["Content-Type"] == "application/json"
        return json.loads(body)


def at(**ago):
    """A time of this program's own tables."""
    return (datetime.now(UTC) - timedelta(**ago)).isoformat()


def attempt(deployment, transfer, number, outcome, code=None, ended=60, size=MB):
    deployment.execute(
        "INSERT INTO transfer_worker_attempt"
        " (data_transfer_id, attempt, task_id, worker, started_at, ended_at, outcome, error_code, message, bytes)"
        " VALUES (?, ?, 'task', 'celery@far', ?, ?, ?, ?, 'no connection', ?)",
        *(transfer, number, at(seconds=ended + 5), at(seconds=ended), outcome, code, size),
    )


def state(deployment, transfer, status, retries=0, message=None):
    deployment.execute(
        "UPDATE data_transfer SET status = ?, retry_count = ?, failure_error_message = ? WHERE id = ?",
        *(status, retries, message, transfer),
    )


class Night:
    """Transfers in every state, and their page."""

    def __init__(self, deployment):
        self.deployment = deployment
        package = lambda: deployment.package(size=10)
        self.completed, self.failed, self.delayed, self.untaken, self.running, self.pending = (package() for _ in range(6))
        state(deployment, self.completed, "COMPLETED")
        attempt(deployment, self.completed, 1, "retried", "stalled", ended=7200)
        attempt(deployment, self.completed, 2, "completed", size=5 * MB)
        state(deployment, self.failed, "FAILED", 1, "no connection")
        attempt(deployment, self.failed, 1, "failed", "origin_missing")
        deployment.execute(
            "UPDATE data_transfer_package SET file_name = ? WHERE id ="
            " (SELECT data_transfer_package_id FROM data_transfer WHERE id = ?)",
            *(HOSTILE, self.failed),
        )
        state(deployment, self.delayed, "PENDING", 1, "no space")
        attempt(deployment, self.delayed, 1, "retried", "storage_full")
        deployment.execute(
            "INSERT INTO transfer_worker_delay VALUES (?, ?, 1, 'storage_full')", self.delayed, at(hours=-1)
        )
        state(deployment, self.untaken, "SCHEDULED")
        deployment.execute(
            "INSERT INTO transfer_worker_schedule (data_transfer_id, scheduled_at, queue, resent) VALUES (?, ?, 'q', 0)",
            *(self.untaken, at(hours=1)),
        )
        state(deployment, self.running, "IN_PROGRESS")
        deployment.execute(
            "INSERT INTO transfer_worker_lease (data_transfer_id, token, attempt, task_id, owner_node, owner_host, owner_pid,"
            " owner_pid_scope, owner_started, acquired_at, renewed_at, expires_at, bytes_done, bytes_total, rate_bytes_per_s,"
            " phase) VALUES (?, 't', 1, 'task', 'celery@far', 'far', 1, '', '', ?, ?, ?, 25, 100, 10, 'copying')",
            *(self.running, at(seconds=9), at(seconds=1), at(hours=-1)),
        )
        self.page = Page(deployment)

    @property
    def link(self):
        return {"origin": self.deployment.origin_site, "destination": self.deployment.destination_site}


@pytest.fixture(scope="module", params=[OwnBbcp, OnPostgres], ids=["sqlite", "postgres"])
def night(request, tmp_path_factory, bbcp, broker):
    deployment = request.param(tmp_path_factory.mktemp("night"), bbcp, broker)
    yield Night(deployment)
    deployment.close()


def test_overview(night):
    until(lambda: night.page.api("overview")["counts"], "the transfers are counted")
    overview = night.page.api("overview")
    counts = {k: v for k, v in overview["counts"].items() if k != "at"}
    assert counts == {"pending": 2, "scheduled": 1, "in_progress": 1, "completed": 1, "failed": 1}
    assert overview["unreachable"] is None
    assert overview["verdict"]["level"] == "action"
    assert overview["verdict"]["text"].startswith("3 transfers require action; "), overview["verdict"]
    assert "1 package (5 MiB) arrived in the last 24 h" in overview["verdict"]["text"]

    (running,) = overview["running"]
    assert (running["id"], running["percent"], running["remaining_s"]) == (night.running, 25, 8)
    assert (running["phase"], running["worker"], running["is_overdue"]) == ("copying", "celery@far", False)

    (link,) = overview["links"]
    assert link.items() >= night.link.items()
    assert (link["active"], link["scheduled"], link["waiting"]) == (1, 1, 2)
    assert (link["oldest_waiting"], link["bytes_per_second"]) == (night.delayed, 10)
    assert (link["packages_24h"], link["bytes_24h"], link["failures_24h"]) == (1, 5 * MB, 3)
    assert overview["last_24h"] == [night.link | {"packages": 1, "bytes": 5 * MB, "failed": 1, "retried": 2}]
    assert night.page.api("links")["links"] == overview["links"]


def test_problems_have_a_remedy(night):
    until(lambda: night.page.api("overview")["counts"], "the transfers are counted")
    problems = {problem["kind"]: problem for problem in night.page.api("problems")["problems"]}
    assert set(problems) == {"failed", "delayed", "untaken"}
    failed = problems["failed"]
    assert (failed["error_code"], failed["count"], failed["requires_action"]) == ("origin_missing", 1, True)
    assert failed["title"] == "The package is not at the origin."
    assert failed["command"] == "ccat-transfer transfers retry --status failed --error origin_missing"
    (transfer,) = failed["transfers"]
    assert (transfer["id"], transfer["file_name"], transfer["message"]) == (night.failed, HOSTILE, "no connection")
    assert transfer["link"] == night.link
    assert problems["delayed"]["requires_action"], "only an operator can make room"
    assert problems["delayed"]["transfers"][0]["next_attempt_at"] > at(minutes=-50)
    assert problems["untaken"]["command"] == "ccat-transfer worker -Q q"


def test_throughput(night):
    for period, step in [("24h", 1800), ("7d", 21600), ("30d", 86400)]:
        throughput = night.page.api("throughput", period=period)
        assert (throughput["period"], throughput["bucket_s"]) == (period, step)
        (link,) = throughput["links"]
        starts = [datetime.fromisoformat(bucket["start"]).timestamp() for bucket in link["buckets"]]
        assert starts == [starts[0] + step * n for n in range(len(starts))]
        sums = [sum(bucket[key] for bucket in link["buckets"]) for key in ("packages", "bytes", "failures")]
        assert sums == [1, 5 * MB, 3]
    assert night.page.api("throughput", origin="nowhere")["links"] == []
    assert "period" in night.page.api("throughput", 400, period="1y")["error"]


def test_search(night):
    def found(**parameters):
        return [transfer["id"] for transfer in night.page.api("transfers", **parameters)["transfers"]]

    everything = [night.pending, night.running, night.untaken, night.delayed, night.failed, night.completed]
    assert found() == everything
    assert found(id=f"{night.failed},{night.pending}") == [night.pending, night.failed]
    assert found(status="failed,in-progress") == [night.running, night.failed]
    assert found(package="ALERT(1)") == [night.failed]
    assert found(package="%") == [night.failed], "no wildcard"
    assert found(error="origin_missing") == [night.failed]
    assert found(origin=night.deployment.origin_site) == everything
    assert found(origin=f"{night.deployment.destination_site}/buffer") == []
    assert found(since="1h") == everything
    assert found(until="1h") == []
    parts, cursor = [], {}
    while cursor is not None:
        part = night.page.api("transfers", limit=4, **cursor)
        parts.append([transfer["id"] for transfer in part["transfers"]])
        cursor = {"cursor": part["next_cursor"]} if part["next_cursor"] else None
    assert parts == [everything[:4], everything[4:]]
    assert night.deployment.origin_site in night.page.api("transfers", 400, origin="nowhere")["error"]


def test_transfer(night):
    logs = night.deployment.directory / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "1.log").write_text("one\n\x1b[31mtwo\n")
    night.deployment.execute(
        "UPDATE transfer_worker_attempt SET log_path = ? WHERE data_transfer_id = ?", str(logs / "1.log"), night.failed
    )
    shown = night.page.api(f"transfers/{night.failed}")
    cli = json.loads(night.deployment.cli("--json", "transfers", "show", night.failed))
    assert {k: v for k, v in shown.items() if k not in ("at", "log")} == cli
    assert shown["transfer"]["package"]["file_name"] == HOSTILE
    assert (shown["log"]["lines"][0], shown["log"]["is_complete"]) == ("one", True)
    assert "\x1b" not in shown["log"]["lines"][1]
    night.deployment.execute(
        "UPDATE transfer_worker_attempt SET log_path = ? WHERE data_transfer_id = ?", "/etc/passwd", night.completed
    )
    assert night.page.api(f"transfers/{night.completed}")["log"] is None
    assert "no transfer 999999" in night.page.api("transfers/999999", 404)["error"]
    assert "whole number" in night.page.api("transfers/x", 400)["error"]


def test_description_matches_the_routes(night):
    paths = night.page.api("openapi.json")["paths"]
    assert {path.removeprefix("/api/v1/") for path in paths} == {*RESOURCES, "transfers/{id}"} - {"openapi.json"}
    for path, methods in paths.items():
        assert list(methods) == ["get"]
        assert night.page.ask(path.replace("{id}", str(night.failed)))[0] == 200


def test_only_get_and_head_are_answered(night):
    paths = [f"/api/v1/{resource}" for resource in RESOURCES] + [f"/api/v1/transfers/{night.failed}", "/", "/nowhere"]
    for path in paths:
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]:
            status, headers, _ = night.page.ask(path, method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD"), (method, path)
        got, head = night.page.ask(path), night.page.ask(path, "HEAD")
        assert (head[0], head[2]) == (got[0], b"")


def test_every_answer_has_the_headers(night):
    for path in ["/api/v1/overview", "/api/v1/nowhere", "/nowhere", "/api/v1/transfers?limit=x"]:
        _, headers, _ = night.page.ask(path)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in headers
    assert night.page.ask("/api/v1/nowhere")[1]["Content-Type"] == "application/json"
    status, headers, body = night.page.ask("/%3Cscript%3Ealert(1)%3C/script%3E")
    assert (status, headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert b"<script>" not in body and b"alert(1)" in body


def test_no_query_is_an_error_of_the_server(night):
    """Random parameters: each is answered, or refused with a sentence."""
    chance = random.Random(20)
    names = ["id", "package", "origin", "destination", "status", "error", "since", "until", "cursor", "limit", "period", "x"]
    words = [
        *("1", "-1", "0", "9223372036854775807", "-9223372036854775808", "99999999999999999999", "1.5", "NaN", "true"),
        *("24h", "1000000y", "-1h", "2026-12-01T00:00:00Z", "9999-12-31T23:59:59Z", "+262000-01-01", "0000-01-01", "now"),
        *("FAILED", "failed,failed", ",", "a/b", "/", "a/", "%", "_", "\\", "'", '"', ";--", "\0", "\ud7ff", "é" * 400, "x" * 3000),
        *("[", "{}", "$1", "?", "\u202e", "\r\nX: y", night.deployment.origin_site, f"{night.deployment.origin_site}/buffer"),
    ]
    statuses = set()
    for _ in range(400):
        pairs = [(chance.choice(names), chance.choice(words)) for _ in range(chance.randint(1, 3))]
        query = urllib.parse.urlencode(pairs)
        if chance.random() < 0.1:
            query = "".join(chance.choice("%&=+;aZ09~,") for _ in range(30))
        path = chance.choice(["transfers", "transfers", "throughput", "overview", "transfers/1", "transfers/%00", "transfers/%ff", "nowhere"])
        status, _, body = night.page.ask(f"/api/v1/{path}?{query}")
        assert status in (200, 400, 404), (path, query, status, body)
        assert "error" in json.loads(body) or status == 200
        statuses.add(status)
    assert statuses == {200, 400, 404}
    assert night.page.api("overview")["unreachable"] is None


def test_token_and_base_path(night, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    refused = night.deployment.cli("web", "--token-file", file, check=False)
    assert refused.returncode == 4 and "chmod 600" in refused.stderr, refused.stderr
    refused = night.deployment.cli("web", "--listen", "0.0.0.0:0", check=False)
    assert refused.returncode == 2 and "--token-file" in refused.stderr, refused.stderr
    file.chmod(0o600)
    page = Page(night.deployment, "--base-path", "/ccat/status", "--token-file", file)
    for given in [{}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Basic {TOKEN}"}]:
        status, headers, body = page.ask("/ccat/status/api/v1/overview", **given)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "token" in json.loads(body)["error"]
    authorized = {"Authorization": f"Bearer {TOKEN}"}
    # A reverse proxy may pass the path on as it is, or without the base path.
    for path in ["/ccat/status/api/v1/overview", "/api/v1/overview"]:
        assert page.ask(path, **authorized)[0] == 200
    status, headers, _ = page.ask("/ccat/status", **authorized)
    assert (status, headers["Location"]) == (308, "/ccat/status/")
    description = json.loads(page.ask("/ccat/status/api/v1/openapi.json", **authorized)[2])
    assert description["servers"] == [{"url": "/ccat/status"}]
    assert TOKEN not in page.process.log()


@pytest.fixture
def on_postgres(tmp_path, bbcp, broker):
    deployment = OnPostgres(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


def test_select_privileges_suffice(on_postgres):
    """The user that the script creates may read the tables of the page, and nothing else."""
    server, user = on_postgres.server, f"web_{uuid.uuid4().hex[:8]}"
    variables = {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": server.username, "WEB_PASSWORD": "secret"}
    script = [REPO / "scripts" / "web-user.sh", on_postgres.database_name, user]
    try:
        for _ in range(2):
            subprocess.run(script, env=os.environ | variables, check=True, capture_output=True, timeout=30)
        transfer = on_postgres.package(size=10)
        page = Page(on_postgres, CCAT_OPS_DB_DATABASE_POSTGRESQL_USER=user, CCAT_OPS_DB_DATABASE_POSTGRESQL_PASSWORD="secret")
        for resource in [*RESOURCES, f"transfers/{transfer}"]:
            page.api(resource)
        until(lambda: page.api("overview")["counts"], "the transfers are counted")
        assert page.api("overview")["unreachable"] is None
        granted = on_postgres.rows(
            "SELECT DISTINCT privilege_type FROM information_schema.role_table_grants WHERE grantee = ?", user
        )
        assert granted == [{"privilege_type": "SELECT"}]
    finally:
        on_postgres.execute(f"DROP OWNED BY {user}; DROP ROLE {user}")


def test_page_says_since_when_the_database_is_gone(on_postgres):
    proxy = Proxy(on_postgres.server.host, on_postgres.server.port)
    on_postgres.database_port = proxy.port
    on_postgres.settings()
    with contextlib.closing(proxy):
        transfer = on_postgres.package(size=10)
        patience = {"CCAT_OPS_DB_ACQUIRE_TIMEOUT": "1s"}
        page = Page(on_postgres, **patience)
        until(lambda: page.api("overview")["counts"], "the transfers are counted")
        proxy.pull()
        gone = until(lambda: page.api("overview")["unreachable"], "the page has noticed it")
        overview = page.api("overview")
        assert overview["verdict"]["level"] == "unknown"
        assert overview["counts"]["pending"] == 1, "the last data are still shown"
        assert overview["unreachable"]["since"] == gone["since"]
        status, _, body = page.ask(f"/api/v1/transfers/{transfer}")
        assert status == 503 and "cannot be read since" in json.loads(body)["error"]
        # A page that starts now has no data.
        other = Page(on_postgres, **patience)
        until(lambda: other.api("overview")["unreachable"], "the other page has noticed it")
        proxy.plug()
        for each in (page, other):
            until(lambda each=each: each.api("overview")["unreachable"] is None, "the page has recovered")


def test_programs_give_signs_of_life(on_postgres):
    port = {"CCAT_DATA_TRANSFER_HTTP__LISTEN": "127.0.0.1:0", "CCAT_DATA_TRANSFER_HTTP__PAGE": "true"}
    worker = on_postgres.worker(**port)
    page = Page(on_postgres)

    def programs():
        return {program["name"]: program for program in page.api("programs")["programs"]}

    name = next(iter(until(programs, "the worker has given a sign of life")))
    assert name.startswith("rust-")
    assert (programs()[name]["kind"], programs()[name]["state"]) == ("worker", "running")
    on_postgres.execute("UPDATE transfer_worker_program SET seen_at = ?", at(minutes=3))
    until(lambda: programs()[name]["state"] == "lost", "the worker is lost")
    (problem,) = page.api("problems")["problems"]
    assert problem["kind"] == "program" and name in problem["title"]
    worker.stop()
    until(lambda: programs()[name]["state"] == "ended", "the worker has ended")
    assert page.api("problems")["problems"] == []
    # Its side port had the same data.
    assert "the pages of the program" in worker.log()


def test_side_port_of_a_worker_has_the_page(on_postgres):
    port = {"CCAT_DATA_TRANSFER_HTTP__LISTEN": "127.0.0.1:0", "CCAT_DATA_TRANSFER_HTTP__PAGE": "true"}
    on_postgres.double(RATE=MB, PLAN="stall@50%")
    transfer = on_postgres.package(size=4 * MB)
    on_postgres.schedule()
    worker = on_postgres.worker(**port)
    said = next(json.loads(line) for line in worker.log().splitlines() if "HTTP port open" in line)
    side = Page.__new__(Page)
    side.url = urllib.parse.urlsplit("http://" + (said.get("fields") or said)["address"])
    assert side.ask("/livez")[0] == 200
    running = until(lambda: side.api("overview")["running"], "the running transfer is shown")
    assert running[0]["id"] == transfer
    until(lambda: side.api("overview")["running"][0]["bytes_done"] > MB, "the progress is shown")
    assert side.ask("/api/v1/overview", "POST")[0] == 405
    refused = on_postgres.cli("worker", check=False, CCAT_DATA_TRANSFER_HTTP__LISTEN="0.0.0.0:0", **{"CCAT_DATA_TRANSFER_HTTP__PAGE": "true"})
    assert refused.returncode == 4 and "page_token_file" in refused.stderr, refused.stderr
