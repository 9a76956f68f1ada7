"""An ops-db with very many transfers, and arguments of lists with the expected number of transfers."""

import contextlib
import sqlite3

ROWS = 100_000
RUNNING = 20


def fill(deployment, on_postgres):
    """Creates the rows by SQL. Transfer i was created i minutes after the first one, the last one now."""

    def label(name, kind):
        # PostgreSQL's enums need a cast; SQLite would convert the value to a number.
        return f"CAST({name} AS {kind})" if on_postgres else name

    def minutes_ago(minutes):
        if on_postgres:
            return f"now() AT TIME ZONE 'UTC' - ({minutes}) * interval '1 minute'"
        return f"datetime('now', (-({minutes})) || ' minutes')"

    def hours_ahead(hours):
        if on_postgres:
            return f"now() + ({hours}) * interval '1 hour'"
        return f"strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now', ({hours}) || ' hours')"

    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})"
    age = f"{ROWS} - i"
    status = label(
        f"CASE WHEN i <= {RUNNING} THEN 'IN_PROGRESS' WHEN i % 10 < 6 THEN 'COMPLETED' WHEN i % 10 = 7 THEN 'FAILED'"
        " WHEN i % 10 = 8 THEN 'SCHEDULED' ELSE 'PENDING' END",
        "status",
    )
    transferring, unpacking = label("'TRANSFERRING'", "packagestate"), label("'PENDING'", "status")
    attempted = f"i <= {RUNNING} OR i % 10 < 6 OR i % 10 IN (7, 9)"
    over = f"i > {RUNNING} AND (i % 10 < 6 OR i % 10 = 7)"
    here, there = (
        f"(SELECT l.id FROM data_location l JOIN site s ON s.id = l.site_id WHERE s.short_name = '{site}')"
        for site in (deployment.origin_site, deployment.destination_site)
    )
    statements = [
        "INSERT INTO data_transfer_package (id, file_name, relative_path, size, status)"
        f" {numbers} SELECT i, 'night-' || i || '.tar', '2026/night-' || i || '.tar', (i * 7919) % 50000000,"
        f" {transferring} FROM n",
        "INSERT INTO data_transfer (id, data_transfer_package_id, origin_location_id, destination_location_id, status,"
        " retry_count, unpack_status, created_at, start_time, end_time)"
        f" {numbers} SELECT i, i, CASE WHEN i % 2 = 0 THEN {here} ELSE {there} END,"
        f" CASE WHEN i % 2 = 0 THEN {there} ELSE {here} END, {status}, i % 4, {unpacking},"
        f" {minutes_ago(age)}, CASE WHEN {attempted} THEN {minutes_ago(age)} END,"
        f" CASE WHEN {over} THEN {minutes_ago(age)} END FROM n",
        "INSERT INTO transfer_worker_attempt (data_transfer_id, attempt, task_id, worker, started_at, ended_at, outcome,"
        f" error_code, message) {numbers} SELECT i, 1, 'task-' || i, 'celery@w', {hours_ahead(-2)}, {hours_ahead(-1)},"
        " 'retried', CASE WHEN i % 10 IN (7, 9) THEN 'network' END, 'a line that says more or less what happened'"
        f" FROM n WHERE {attempted}",
        "INSERT INTO transfer_worker_attempt (data_transfer_id, attempt, task_id, worker, started_at, ended_at, outcome,"
        f" error_code) {numbers} SELECT i, 2, 'task-' || i, 'celery@w', {hours_ahead(-2)}, {hours_ahead(-1)}, 'failed',"
        " 'stalled' FROM n WHERE i % 1000 = 7",
        "INSERT INTO transfer_worker_delay (data_transfer_id, not_before, retry_count, error_code)"
        f" {numbers} SELECT i, CASE WHEN i % 20 = 9 THEN {hours_ahead(1)} ELSE {hours_ahead(-1)} END, i % 4, 'network'"
        f" FROM n WHERE i > {RUNNING} AND i % 10 = 9",
        "INSERT INTO transfer_worker_lease (data_transfer_id, token, attempt, task_id, owner_node, owner_host, owner_pid,"
        " owner_pid_scope, owner_started, acquired_at, renewed_at, expires_at, bytes_done, bytes_total, rate_bytes_per_s,"
        f" destination, phase, streams) {numbers} SELECT i, 'token-' || i, 1, 'task-' || i, 'celery@w' || (i % 2), 'w', 1, '',"
        f" '', {hours_ahead(-1)}, {hours_ahead(0)}, {hours_ahead(1)}, 1000, 2000, 10, 'there:/' || i, 'copying', 16"
        f" FROM n WHERE i <= {RUNNING}",
        # PostgreSQL's autovacuum does this by itself; in SQLite the owner of the database may do it.
        "ANALYZE",
    ]
    if on_postgres:
        for statement in statements:
            deployment.connection.execute(statement)
        return
    with contextlib.closing(sqlite3.connect(deployment.database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def count(condition):
    return sum(1 for i in range(1, ROWS + 1) if condition(i))


def cases(deployment):
    """Arguments of `transfers list`, and the number of transfers that they select."""
    old = RUNNING
    pending = count(lambda i: i > old and i % 10 in (6, 9))
    failed = count(lambda i: i > old and i % 10 == 7)
    network = count(lambda i: (i % 10 == 9 or i % 10 == 7) and i % 1000 != 7)
    waiting = count(lambda i: i > old and i % 20 == 9)
    half = ROWS // 2
    origin = deployment.origin_site
    return [
        ("", ROWS),
        ("--status failed", failed),
        ("--status pending,failed", pending + failed),
        ("--status in-progress", RUNNING),
        (f"--site {origin}", ROWS),
        (f"--from {origin}", half),
        (f"--to {origin}/buffer", half),
        (f"--older-than {half}m", None),
        ("--newer-than 1h", None),
        ("--older-than 1000d", 0),
        ("--error network", network),
        ("--error stalled", ROWS // 1000),
        ("--error segfault", 0),
        ("--held-by celery@w1", RUNNING // 2),
        ("--waiting", waiting),
        (f"--waiting --from {origin} --error network", 0),
        ("--status completed --older-than 1d", None),
        *((f"--sort {key}", ROWS) for key in ("age", "age --reverse", "status", "size", "retries")),
        (f"--status failed --error stalled --to {origin} --sort size", ROWS // 1000 - 1),
    ]
