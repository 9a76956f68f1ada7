"""Comparisons of the manager: passes on different databases."""

import os

from .sides import Comparison, Figures, Row, bench_lines


def measure(database, scenario, rows):
    """Runs ccat-bench; returns seconds by name and side."""
    where = database if database == "sqlite" else os.environ["TEST_POSTGRES_URL"]
    lines = bench_lines("manager", where, scenario, rows)
    return {(line["name"].split("/")[1], line["side"]): line["seconds"] for line in lines}


def both_sides(database, rows):
    """Both sides come from one run of the program, one after the other."""
    seconds = measure(database, "schedule", rows)
    manager, bare = seconds["schedule", "manager"], seconds["schedule", "bare"]
    return Figures(seconds=manager, rows_per_s=rows / manager, share_of_bare=bare / manager)


def steady(database, few, many):
    """Measures the same pass with few and with many completed rows in the table."""
    beside_few, beside_many = measure(database, "steady", few), measure(database, "steady", many)
    key = "steady", "manager"
    return Figures(few_s=beside_few[key], many_s=beside_many[key], growth=beside_many[key] / beside_few[key])


def backlog(database, rows):
    return Figures(seconds=measure(database, "backlog", rows)["backlog", "manager"])


def comparisons(quick):
    rows, many = (2_000, 20_000) if quick else (10_000, 100_000)
    for database in ("sqlite", "postgresql"):
        yield Comparison(
            f"manager-{database}",
            f"a pass that schedules {rows} rows, and the same updates and messages by bare SQL and lapin",
            {"manager": lambda database=database: both_sides(database, rows)},
            [
                Row(f"schedule {rows} rows, {database}", "s", "seconds", "manager", target=10, at_most=True),
                Row("  share of the bare rate", "", "share_of_bare", "manager", target=0.5, stretch=0.8),
            ],
        )
        yield Comparison(
            f"steady-{database}",
            f"a pass that sends 100 rows beside 1000 and beside {many} COMPLETED ones",
            {"manager": lambda database=database: steady(database, 1_000, many)},
            [Row(f"growth, {database}", "", "growth", "manager", target=1.3, stretch=1.1, at_most=True)],
            warm_ups=0,
        )
        yield Comparison(
            f"backlog-{database}",
            f"a pass with {many} PENDING rows, 1000 within the limits of ten links",
            {"manager": lambda database=database: backlog(database, many)},
            [Row(f"backlog of {many} rows, {database}", "s", "seconds", "manager")],
            warm_ups=0,
            pairs=2,
        )
