"""The side port and the notifications to systemd: in normal operation, while a server is unreachable, and when a loop of
the process has stopped."""

import contextlib
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import sqlalchemy as sa

from proxy import Proxy
from support import MB, REPO, TRANSFER, Process, clean_environment, service, until
from variants import OnPostgres

pytestmark = pytest.mark.timeout(120)

BROKERS = ["rabbitmq", "redis"]

# The name comes from celery-exporter; promtool has a remark about it.
KNOWN_TO_PROMTOOL = "celery_active_consumer_count non-histogram and non-summary metrics should not have"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class SidePort:
    def __init__(self, port=None):
        self.address = f"127.0.0.1:{port or free_port()}"

    def get(self, path, method="GET"):
        """Status and text; (0, reason) if there is no answer."""
        request = urllib.request.Request(f"http://{self.address}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def is_(self, path, status, text="", seconds=20):
        try:
            until(lambda: self.answers(path, status, text), f"{path} is {status} {text!r}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.last}") from None

    def answers(self, path, status, text=""):
        self.last = self.get(path)
        return self.last[0] == status and text in self.last[1]

    def metrics(self):
        """{'name{labels}': value}, with unparsed labels."""
        status, text = self.get("/metrics")
        assert status == 200, text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def metric(self, metric, /, **labels):
        """The sum of the values that have these labels; None if there is none."""
        found = [
            value
            for key, value in self.metrics().items()
            if key.partition("{")[0] == metric and all(f'{k}="{v}"' in key for k, v in labels.items())
        ]
        return sum(found) if found else None


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, directory):
        self.path = str(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)
        self.said = []

    def environment(self, watchdog=None):
        # Without WATCHDOG_PID the watchdog applies to every process with this environment.
        limit = {"WATCHDOG_USEC": int(watchdog * 1e6)} if watchdog else {}
        return {"NOTIFY_SOCKET": self.path, **limit}

    def heard(self, word):
        """Number of notifications that begin with `word`, until now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.said += self.socket.recv(4096).decode().splitlines()
        return sum(said.startswith(word) for said in self.said)

    def hears(self, word):
        until(lambda: self.heard(word), f"systemd receives {word}; the last ones are {self.said[-3:]}")


class Watched(OnPostgres):
    """A deployment whose workers reach broker, database and Redis through proxies."""

    def __init__(self, directory, bbcp, broker):
        super().__init__(directory, bbcp, broker)
        redis = sa.make_url(service("TEST_REDIS_URL"))
        self.proxies = {
            "broker": Proxy(*broker.address),
            "database": Proxy(self.server.host, self.server.port),
            "result backend": Proxy(redis.host, redis.port),
        }
        self.database_port = self.proxies["database"].port
        self.settings()
        self.behind = {
            "CELERY_BROKER_URL": broker.through(self.proxies["broker"]),
            "CELERY_RESULT_BACKEND": f"redis://127.0.0.1:{self.proxies['result backend'].port}/0",
            "CCAT_DATA_TRANSFER_OPS_DB__ACQUIRE_TIMEOUT": "1s",
            "CCAT_DATA_TRANSFER_HTTP__STOPPED_AFTER": "3s",
        }

    def service(self, *arguments, port=None, **environment):
        """A worker or manager."""
        if port:
            environment["CCAT_DATA_TRANSFER_HTTP__LISTEN"] = port.address
        process = Process(
            [service("CCAT_TRANSFER_BIN"), "--config", self.config, *arguments],
            self.directory / f"service-{len(self.processes)}.log",
            cwd=self.directory,
            env=clean_environment(**self.behind | environment),
        )
        self.processes.append(process)
        return process

    def watched_worker(self, *arguments, port=None, **environment):
        name = f"watched{len(self.processes)}-{self.queue}@somewhere"
        return self.service("worker", "-Q", self.queue, "-n", name, "-c", "2", *arguments, port=port, **environment)

    def close(self):
        super().close()
        for proxy in self.proxies.values():
            proxy.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory, bbcp, broker):
    deployment = Watched(tmp_path_factory.mktemp("watched"), bbcp, broker)
    yield deployment
    deployment.close()


@pytest.fixture
def own(tmp_path, bbcp, broker):
    deployment = Watched(tmp_path, bbcp, broker)
    yield deployment
    deployment.close()


@pytest.fixture(scope="module")
def worker(watched):
    """A worker for the tests that do not change its state."""
    port = SidePort()
    worker = watched.watched_worker(port=port)
    worker.port = port
    port.is_("/readyz", 200)
    return worker


@pytest.fixture(scope="module")
def manager(watched):
    port = SidePort()
    manager = watched.service("manager", port=port)
    manager.port = port
    port.is_("/readyz", 200)
    return manager


@pytest.mark.rabbitmq("no broker involved")
def test_the_port_serves_only_its_three_paths(worker):
    """The port only answers GET of three paths, at the configured address."""
    port = worker.port
    assert port.get("/livez") == (200, "alive\n")
    assert port.get("/readyz") == (200, "ready\n")
    assert port.get("/")[0] == port.get("/metrics/x")[0] == 404
    assert port.get("/livez", "POST")[0] == port.get("/metrics", "DELETE")[0] == 405
    # A silent connection does not block others, nor does one that never ends its request.
    host, number = port.address.split(":")
    idle = [socket.create_connection((host, int(number))) for _ in range(10)]
    for connection in idle:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
    assert port.get("/livez")[0] == 200
    for connection in idle:
        connection.close()


@pytest.mark.rabbitmq("no broker involved")
def test_a_port_in_use_is_a_clear_error(watched, worker):
    second = watched.watched_worker(port=worker.port)
    assert second.ended() == 1
    assert f"http.listen: cannot listen on {worker.port.address}" in second.log()
    assert "Address already in use" in second.log()


def test_tasks_and_transfers_are_counted(watched, worker, manager):
    """The counters are exactly the number of tasks and transfers."""
    port, link = worker.port, {"origin": watched.origin_site, "destination": watched.destination_site}
    labels = {"hostname": "somewhere", "queue_name": watched.queue, "name": TRANSFER}
    assert port.metric("celery_task_succeeded_total", **labels) == 0
    sizes = [MB, 2 * MB]
    transfers = [watched.package(size=size) for size in sizes]
    for transfer in transfers:
        watched.reaches(transfer, "COMPLETED")
    until(lambda: port.metric("celery_task_succeeded_total", **labels) == 2, "two tasks have succeeded")
    metrics = port.metrics()
    assert port.metric("celery_task_received_total", **labels) == 2
    assert port.metric("celery_task_started_total", **labels) == 2
    assert port.metric("celery_task_failed_total", **labels) == 0
    assert port.metric("celery_task_runtime_count", **labels) == 2
    assert port.metric("ccat_transfer_bytes_total", **link) == sum(sizes)
    assert port.metric("ccat_transfer_attempts_total", outcome="completed", error="") == 2
    assert port.metric("ccat_transfer_copies_running", **link) == 0
    assert port.metric("ccat_transfer_rate_bytes_per_second", **link) == 0

    # A failing task, and its error.
    watched.double(PLAN="refused", ACCEPT=0.1)
    failing = watched.package()
    until(lambda: watched.row(failing)["retry_count"] == 1, "it has failed once")
    until(lambda: port.metric("celery_task_failed_total", **labels), "a task has failed")
    (failed,) = [key for key, value in port.metrics().items() if key.startswith("celery_task_failed") and value]
    assert re.search(r'exception="\w+"', failed)
    assert port.metric("ccat_transfer_attempts_total", outcome="retried") >= 1
    watched.double()
    watched.reaches(failing, "COMPLETED")

    # Unknown names create no metrics, because a client could send any number of them.
    watched.broker.publish(
        watched.queue,
        b"[[], {}, {}]",
        {"task": "made.up.by.someone", "id": "x1", "lang": "py"},
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id="x1",
    )
    until(lambda: port.metric("celery_task_failed_total", name="unknown"), "the unknown task is counted")
    assert "made.up" not in port.get("/metrics")[1]

    # Metrics of the process and the program.
    assert metrics["process_resident_memory_bytes"] > 1e6 and metrics["process_open_fds"] > 5
    assert abs(metrics["process_start_time_seconds"] - time.time()) < 600
    assert port.metric("ccat_transfer_build_info") == 1
    assert port.metric("celery_worker_up", hostname="somewhere") == 1
    assert port.metric("celery_queue_length", queue_name=watched.queue) == 0
    consumers = 1 if watched.broker.counts_consumers else None
    assert port.metric("celery_active_consumer_count", queue_name=watched.queue) == consumers

    # Metrics of the manager.
    port = manager.port
    assert port.metric("ccat_transfer_manager_scheduled_total") >= 4
    assert port.metric("celery_task_sent_total", name=TRANSFER, queue_name=watched.queue) >= 4
    assert port.metric("ccat_transfer_manager_pass_duration_seconds_count") >= 3
    assert port.metric("ccat_transfer_manager_passes_failed_total") == 0
    assert time.time() - port.metrics()["ccat_transfer_manager_last_pass_timestamp_seconds"] < 30


@pytest.mark.rabbitmq("no broker involved")
def test_the_table_is_counted(own):
    """Rows by status, and the age of the oldest; the same from a worker and a manager."""
    port = SidePort()
    waiting = own.package()
    own.watched_worker(port=port)
    port.is_("/readyz", 200)
    assert port.metric("ccat_transfer_transfers", status="PENDING") == 1
    assert port.metric("ccat_transfer_transfers", status="COMPLETED") == 0
    assert port.metric("ccat_transfer_oldest_pending_seconds") >= 0
    assert port.metric("ccat_transfer_scrape_error", source="database") == 0
    assert own.status(waiting) == "PENDING"


@pytest.mark.parametrize("silently", [False, True], ids=["refused", "silent"])
def test_an_unreachable_server_is_not_a_dead_process(watched, worker, manager, silently):
    """Not ready during an outage, with a line for each reason, but alive; ready again after it."""
    port = worker.port
    port.is_("/readyz", 200)
    reconnects = port.metric("ccat_transfer_broker_reconnects_total")
    is_noticed = watched.broker.notices_silence or not silently
    away = ["broker", "database", "result backend"][not is_noticed :]
    try:
        for server in away:
            watched.proxies[server].pull(silently)
            port.is_("/readyz", 503, f"{server}: ")
            reasons = {line.partition(": ")[0] for line in port.last[1].splitlines()}
            assert reasons == set(away[: away.index(server) + 1]), port.last
        manager.port.is_("/readyz", 503, "database: ")
        assert ("broker: " in manager.port.last[1]) == is_noticed
        # Longer than a loop may be late; slow answers of the servers do not delay a scrape.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert port.get("/livez") == manager.port.get("/livez") == (200, "alive\n")
            began = time.monotonic()
            assert (port.get("/metrics")[0], port.get("/readyz")[0]) == (200, 503)
            assert time.monotonic() - began < 8
            time.sleep(0.2)
        if is_noticed:
            assert port.metric("ccat_transfer_broker_connected") == 0
            assert port.metric("ccat_transfer_scrape_error", source="broker") == 1
    finally:
        for server in away:
            watched.proxies[server].plug()
    port.is_("/readyz", 200, seconds=60)
    manager.port.is_("/readyz", 200, seconds=60)
    assert port.metric("ccat_transfer_broker_reconnects_total") == reconnects + is_noticed
    assert worker.running() and manager.running()


def test_a_stopped_loop_is_reported(own, tmp_path):
    """/livez names the stopped loop, and systemd's watchdog is not fed any more."""
    ports = SidePort(), SidePort()
    lease = {"CCAT_DATA_TRANSFER_TRANSFER__LEASE_TTL": "1s", "CCAT_DATA_TRANSFER_TRANSFER__LEASE_RENEW_INTERVAL": "300ms"}
    short = {"CCAT_DATA_TRANSFER_OPS_DB__ACQUIRE_TIMEOUT": "300ms", **lease}
    systemd = Systemd(tmp_path)
    # This short time limit may be exceeded on a busy host: they try again.
    worker = own.watched_worker(
        "--wait-for", port=ports[0], CCAT_TRANSFER_FAULT="sweeper:hang:2", **systemd.environment(watchdog=0.5), **short
    )
    manager = own.service("manager", "--wait-for", port=ports[1], CCAT_TRANSFER_FAULT="manager_loop:hang:2", **short)
    ports[0].is_("/readyz", 200)
    systemd.hears("WATCHDOG=1")
    ports[0].is_("/livez", 503, "sweeper: no progress since 20")
    ports[1].is_("/livez", 503, "manager: no progress since 20")
    assert ports[0].last[1].count("\n") == 1, "no other loop does"
    systemd.hears("STATUS=the loop `sweeper` has stopped")
    fed = systemd.heard("WATCHDOG=1")
    time.sleep(1)
    assert systemd.heard("WATCHDOG=1") == fed
    assert worker.running() and manager.running()


# Without remote control the only subscription is the one for tasks.
ALONE = {"CCAT_DATA_TRANSFER_CELERY__WORKER_ENABLE_REMOTE_CONTROL": "false"}


def test_a_consumer_that_panics_is_replaced(own):
    """A panic in the consumer of a queue: the queue is consumed again, and its messages are delivered."""
    port = SidePort()
    worker = own.watched_worker(port=port, CCAT_TRANSFER_FAULT="queue_consumer:panic", **ALONE)
    port.is_("/readyz", 200)
    transfer = own.package(size=1000)
    own.schedule()
    worker.says("panicked, which is a bug; reconnecting")
    own.reaches(transfer, "COMPLETED")
    port.is_("/readyz", 200)
    assert port.get("/livez")[0] == 200 and worker.running()


def test_a_subscription_that_panics_ends_the_worker(own):
    """A worker that loses its task subscription ends with an error, so that it is restarted."""
    port = SidePort()
    worker = own.watched_worker(port=port, CCAT_TRANSFER_FAULT="subscription:panic:3", **ALONE)
    assert worker.ended() == 5
    assert "the subscription for tasks panicked, which is a bug of this program" in worker.log()


def test_systemd_is_notified(own, tmp_path):
    """systemd is notified when the worker consumes, of its status, and of its stop for as long as it takes."""
    own.proxies["broker"].pull()
    own.double(RATE=MB)
    systemd = Systemd(tmp_path)
    port = SidePort()
    worker = own.watched_worker(port=port, **systemd.environment(watchdog=1))
    systemd.hears("STATUS=waiting for the database and the broker")
    systemd.hears("WATCHDOG=1")
    assert not systemd.heard("READY=1")
    assert port.get("/livez")[0] == 200 and port.get("/readyz")[0] == 503
    own.proxies["broker"].plug()
    systemd.hears("READY=1")
    transfer = own.package(size=4 * MB)
    own.schedule()
    own.mid_copy()
    systemd.hears("STATUS=1 copy runs, ")
    until(lambda: port.metric("ccat_transfer_rate_bytes_per_second"), "the rate is shown")
    assert port.metric("ccat_transfer_copies_running") == 1
    worker.signal(signal.SIGTERM)
    systemd.hears("STOPPING=1")
    port.is_("/readyz", 503, "stopping")
    systemd.hears("STATUS=stopping; 1 copy runs")
    fed = systemd.heard("WATCHDOG=1")
    until(lambda: systemd.heard("WATCHDOG=1") > fed, "the watchdog is fed to the end")
    assert worker.ended() == 0
    own.assert_moved(transfer)
    assert systemd.heard("READY=1") == 1


def test_running_copies_get_a_limited_time(own):
    """transfer.shutdown_timeout: after it the messages go back, and the next worker continues the partial copies."""
    own.double(RATE=MB)
    worker = own.watched_worker(CCAT_DATA_TRANSFER_TRANSFER__SHUTDOWN_TIMEOUT="500ms")
    worker.says("worker ready")
    transfer = own.package(size=30 * MB)
    own.schedule()
    own.mid_copy()
    worker.signal(signal.SIGTERM)
    assert worker.ended(15) == 0
    assert "the time for running tasks is over" in worker.log()
    assert own.outcomes(transfer) == ["interrupted"]
    assert own.row(transfer)["retry_count"] == 0
    assert own.broker.ready(own.queue) == 1


def test_hup_restarts_the_program(own, tmp_path):
    """The running copy is finished first; then the same process has the current settings. With settings that
    cannot be used it continues unchanged."""
    own.double(RATE=MB)
    before, after = SidePort(), SidePort()
    own.settings(http={"listen": before.address})
    systemd = Systemd(tmp_path)
    worker = own.watched_worker(**systemd.environment(watchdog=1))
    systemd.hears("READY=1")
    own.settings(http={"listen": "everywhere"})
    worker.signal(signal.SIGHUP)
    worker.says("restart refused: the new settings are not valid")
    own.settings(http={"listen": after.address})
    transfer = own.package(size=3 * MB)
    own.schedule()
    own.mid_copy()
    worker.signal(signal.SIGHUP)
    systemd.hears("STATUS=restarts when the running tasks have ended; 1 copy runs")
    before.is_("/readyz", 503, "restarting")
    worker.says('"program restarts"')
    own.assert_moved(transfer)
    after.is_("/readyz", 200)
    # Either would mean the end of the service to systemd, or delay `systemctl reload` until the copies have ended.
    assert not systemd.heard("STOPPING=1") and not systemd.heard("RELOADING=1")
    assert before.get("/livez")[0] == 0
    assert worker.running() and len(own.copies()) == 1
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0


def test_waiting_at_the_start(own):
    """--wait-for: waits for a broker and a database that do not run yet, with a time limit."""
    for proxy in own.proxies.values():
        proxy.pull()
    impatient = own.watched_worker()
    assert impatient.ended() == 5
    late = own.watched_worker("--wait-for=1"), own.service("manager", "--wait-for=1")
    assert [process.ended() for process in late] == [5, 5]
    port = SidePort()
    patient = own.watched_worker("--wait-for", port=port)
    patient.says('"server":"the database"')
    assert port.get("/livez")[0] == 200
    assert port.get("/readyz") == (503, "starting\n")
    own.proxies["database"].plug()
    patient.says('"server":"the broker"')
    own.proxies["broker"].plug()
    own.proxies["result backend"].plug()
    port.is_("/readyz", 200)


@pytest.mark.parametrize("away", ["database", "broker"])
@pytest.mark.parametrize("command", ["worker", "manager"])
def test_a_service_that_waits_can_be_stopped(own, tmp_path, command, away):
    """Otherwise a stop would last until the server is reachable, and systemd's watchdog would fire after a reload."""
    own.proxies[away].pull()
    systemd = Systemd(tmp_path)
    waiting = own.service(command, "--wait-for=300", **systemd.environment(watchdog=1))
    waiting.says(f'"server":"the {away}"')
    fed = systemd.heard("WATCHDOG=1")
    until(lambda: systemd.heard("WATCHDOG=1") > fed, "the watchdog is fed")
    assert not systemd.heard("READY=1")
    waiting.signal(signal.SIGTERM)
    assert waiting.ended(10) == 0


# ---------------------------------------------------------------- readers of the metrics


def test_the_containers_health_check(worker):
    """The command of the Dockerfile, on this worker's port and on a port without a listener."""
    dockerfile = (REPO / "packaging/docker/Dockerfile").read_text()
    command = json.loads(re.search(r"^HEALTHCHECK.*\\\n  CMD (.*)$", dockerfile, re.M)[1])
    for port, healthy in ((worker.port.address.split(":")[1], True), (free_port(), False)):
        here = [word.replace("9808", str(port)) for word in command]
        assert (subprocess.run(here, capture_output=True, timeout=20).returncode == 0) is healthy


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_accepts_the_metrics(worker, manager):
    for process in (worker, manager):
        _, text = process.port.get("/metrics")
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
        )
        said = [line for line in (checked.stdout + checked.stderr).splitlines() if not line.startswith(KNOWN_TO_PROMTOOL)]
        assert said == []


def test_the_page_lists_every_metric(worker, manager):
    listed = set(re.findall(r"`(\w+)`", (REPO / "docs/operations/metrics.md").read_text()))
    for process in (worker, manager):
        _, text = process.port.get("/metrics")
        names = set(re.findall(r"^# TYPE (\w+) ", text, re.M))
        assert len(names) > 10 and names <= listed, names - listed


class Prometheus:
    """A real Prometheus with the configuration of packaging/compose, except for these ports and a shorter interval."""

    def __init__(self, directory, **targets):
        self.address = f"127.0.0.1:{free_port()}"
        configuration = (REPO / "packaging/compose/prometheus.yml").read_text()
        for there, here in {"scrape_interval: 15s": "scrape_interval: 500ms", **targets}.items():
            assert there in configuration
            configuration = configuration.replace(there, here)
        (directory / "prometheus.yml").write_text(configuration)
        flags = {
            "config.file": directory / "prometheus.yml",
            "storage.tsdb.path": directory / "data",
            "web.listen-address": self.address,
        }
        command = ["prometheus", *(f"--{flag}={value}" for flag, value in flags.items())]
        self.process = Process(command, directory / "prometheus.log", cwd=directory, env=clean_environment())

    def get(self, path, **parameters):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with contextlib.suppress(urllib.error.URLError):  # it is starting
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]

    def query(self, expression):
        """[({label: value}, number)], without values that are not numbers."""
        answer = self.get("query", query=expression) or {"result": []}
        found = [(one["metric"], float(one["value"][1])) for one in answer["result"]]
        return [(labels, number) for labels, number in found if not math.isnan(number)]


@pytest.mark.rabbitmq("numbers of consumers")
@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")
def test_every_panel_has_data(watched, worker, manager, tmp_path):
    """Runs the queries of packaging/grafana in a Prometheus during and after a transfer."""
    dashboard = json.loads((REPO / "packaging/grafana/ccat-transfer.json").read_text())
    targets = [(panel["title"], target) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 20
    ports = {"worker:9808": worker.port.address, "manager:9808": manager.port.address}
    prometheus = Prometheus(tmp_path, **ports)
    watched.double(RATE=MB)
    try:
        # Grafana's values of the variables: four times the data source's scrape interval, and all values of the other one.
        def asked(expression):
            return prometheus.query(expression.replace("$__rate_interval", "10s").replace("$job", ".*"))

        (job,) = [one["query"] for one in dashboard["templating"]["list"] if one["name"] == "job"]
        series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", job).groups()
        until(lambda: prometheus.get(f"label/{label}/values", **{"match[]": series}) == ["ccat-transfer"], "the job is seen")
        transfer = watched.package(size=5 * MB)
        rate = 'sum(ccat_transfer_rate_bytes_per_second{job=~"$job"})'
        assert rate in [target["expr"] for _, target in targets]
        until(lambda: any(number > 0 for _, number in asked(rate)), "the rate of a copy is seen")
        watched.reaches(transfer, "COMPLETED")
        for title, target in targets:
            found = until(lambda: asked(target["expr"]), f"{title}: there are data for {target['expr']}")
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(shown <= set(labels) | {"error"} for labels, _ in found), (title, found)
        until(lambda: any(number > 0 for _, number in asked("increase(ccat_transfer_bytes_total[1h])")), "the bytes are counted")
    finally:
        watched.double()
        prometheus.process.stop()


@pytest.mark.rabbitmq("numbers of consumers")
def test_the_dashboard_uses_existing_metrics(watched, worker, manager):
    """Every metric in packaging/grafana exists in a scrape, and Grafana can import the file."""
    dashboard = json.loads((REPO / "packaging/grafana/ccat-transfer.json").read_text())
    assert dashboard["id"] is None and dashboard["uid"] and dashboard["title"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    queries = []
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        queries += [target["expr"] for target in panel["targets"]]
    queries += [variable["query"] for variable in variables.values() if variable["type"] == "query"]
    # A running copy, for the metrics that exist only during one.
    transfer = watched.package()
    watched.reaches(transfer, "COMPLETED")
    there = {key.partition("{")[0] for process in (worker, manager) for key in process.port.metrics()}
    asked = set(re.findall(r"\b(?:celery|ccat_transfer|process)_\w+", " ".join(map(str, queries))))
    assert len(asked) > 10 and asked <= there, asked - there
