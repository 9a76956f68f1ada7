"""Runs the comparisons of scripts/bench.sh, alternating between the sides, and prints one table of results."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import amqp

from . import copies, link, manager, redis_workers, web, workers
from .sides import Figures, Failed


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench.sh", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="comparisons, by the beginnings of their names")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: a look, not a figure to quote")
    parser.add_argument("--pairs", type=int, help="runs of each side [default: 5; with --quick 1]")
    parser.add_argument("--list", action="store_true", help="print the names only")
    options = parser.parse_args()
    comparisons = [c for module in (workers, redis_workers, copies, manager, web, link) for c in module.comparisons(options.quick)]
    if "BENCH_BEFORE" in os.environ:
        comparisons += workers.against_before(options.quick)
    if options.list:
        return print(*(f"{c.name}{' (only when named)' if c.extra else ''}" for c in comparisons), sep="\n")
    is_named = lambda c: any(c.name.startswith(name) for name in options.names)
    wanted = [c for c in comparisons if is_named(c) or not (options.names or c.extra)]
    if not wanted:
        sys.exit(f"bench: no comparison of these names; there are {', '.join(c.name for c in comparisons)}")
    began = time.monotonic()
    done = []
    for comparison in wanted:
        since = time.monotonic()
        try:
            done.append(run(comparison, options.pairs or (1 if options.quick else comparison.pairs)))
        finally:
            comparison.close()
        print(f"   {time.monotonic() - since:.0f} s", flush=True)
    rows = [row for comparison, runs in done for row in rows_of(comparison, runs)]
    print()
    print_table(rows)
    path = write(rows, done, options.quick)
    failed = sum(row["failed"] for row in rows)
    print(f"\n{len(rows)} rows, {failed} with failed runs, in {time.monotonic() - began:.0f} s; {path}")
    sys.exit(1 if failed else 0)


def run(comparison, pairs):
    """All runs of a comparison: side → list of figures or failures."""
    print(f"\n== {comparison.name}: {comparison.title}", flush=True)
    runs = {side: [] for side in comparison.sides}
    for number in range(-comparison.warm_ups, pairs):
        for side, measure in comparison.sides.items():
            began = time.monotonic()
            try:
                figures = measure()
            except (Failed, amqp.AMQPError, subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
                figures = error
            shown = f"FAILED: {figures}" if isinstance(figures, Exception) else Figures.show(figures)
            label = "warm-up" if number < 0 else f"run {number + 1}"
            print(f"   {label:8} {side:22} {shown}  ({time.monotonic() - began:.1f} s)", flush=True)
            if number >= 0:
                runs[side].append(figures)
    return comparison, runs


def rows_of(comparison, runs):
    """The rows of the table for one comparison."""
    for row in comparison.rows:
        def values(side, figure):
            return [None if isinstance(run, Exception) else run.get(figure) for run in runs[side]]

        figure = row.figure
        ours = values(row.ours, figure)
        theirs = values(row.theirs, row.their_figure or figure) if row.theirs else []
        ratios = []
        if row.theirs:
            pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b]
            ratios = [b / a if row.inverted else a / b for a, b in pairs if a]
        known = [value for value in ours if value is not None]
        judged = statistics.median(ratios or known) if (ratios or known) else None
        yield {
            "comparison": comparison.name,
            "measure": row.title,
            "unit": row.unit,
            "ours": spread(ours),
            "theirs": spread(theirs),
            "against": row.theirs,
            "ratio": statistics.median(ratios) if ratios else None,
            "target": row.target,
            "stretch": row.stretch,
            "met": None if judged is None or row.target is None else row.meets(judged, row.target),
            "stretch_met": None if judged is None or row.stretch is None else row.meets(judged, row.stretch),
            "failed": sum(value is None for value in [*ours, *theirs]),
        }


def spread(values):
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": min(known), "median": statistics.median(known), "max": max(known), "runs": len(known)}


def number(value):
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(rows):
    head = ("measure", "unit", "ours: min", "median", "max", "theirs: min", "median", "max", "ratio", "target", "")
    lines = []
    for row in rows:
        cells = [row["measure"], row["unit"]]
        for side in ("ours", "theirs"):
            cells += [number((row[side] or {}).get(key)) for key in ("min", "median", "max")]
        cells.append(number(row["ratio"]))
        cells.append("" if row["target"] is None else number(row["target"]))
        verdict = {True: "met", False: "NOT MET", None: ""}[row["met"]]
        if row["stretch_met"]:
            verdict = "met, and the stretch"
        if row["failed"]:
            verdict = f"{row['failed']} runs FAILED {verdict}"
        lines.append([*cells, verdict])
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in (head, ["-" * width for width in widths], *lines):
        print("  ".join(cell.ljust(width) if i < 2 or i > 9 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip())


def write(rows, done, quick):
    import celery

    folder = pathlib.Path(os.environ["BENCH_RESULTS"])
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    path = folder / f"{now:%Y%m%d-%H%M%S}{'-quick' if quick else ''}.json"
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit,
        "machine": {"processors": os.cpu_count(), "model": model, "kernel": platform.release()},
        "versions": {"python": platform.python_version(), "celery": celery.__version__, "rabbitmq": workers.broker_version()},
        "bbcp": copies.bbcp_kind(),
        "rows": rows,
        "runs": {
            comparison.name: {
                side: [str(run) if isinstance(run, Exception) else run for run in of_side] for side, of_side in runs.items()
            }
            for comparison, runs in done
        },
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
