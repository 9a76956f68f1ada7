"""Compares the outcomes of Celery's own tests with both workers: the tests that pass with Python's worker and fail with ours.

    compare.py DIRECTORY SETUP…     reads SETUP-python.json, SETUP-rust.json and SETUP-again.json

Differences that known_differences.toml contains are printed with their reason. Any other one is a failure. A test that differs
is run a second time with our worker: if it passes then, it is *unsteady*, and printed. More than MOST_UNSTEADY of them in one
setup are a failure, too: a worker that fails now and then differs. So is a setup in which fewer tests pass with Python's worker
than known_differences.toml states: it has not compared much.

    --least N    another number of tests in place of the stated ones, for a selection of tests
    --failed     only prints the tests of the setup to run again
"""

import argparse
import fnmatch
import json
import sys
import tomllib
from pathlib import Path

FILE = tomllib.loads((Path(__file__).parent / "known_differences.toml").read_text())
KNOWN, LEAST = FILE["difference"], FILE["least"]
MOST_KNOWN = 5
MOST_UNSTEADY = 3


def outcomes(directory, setup, kind):
    path = directory / f"{setup}-{kind}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def differences(directory, setup):
    """The tests that pass with Python's worker only, and the number of those that pass with it."""
    python, rust = (outcomes(directory, setup, kind) for kind in ("python", "rust"))
    passed = [test for test, outcome in python.items() if outcome == "passed"]
    return [test for test in passed if rust.get(test) != "passed"], len(passed)


def reason(test):
    found = [known["reason"] for known in KNOWN if any(fnmatch.fnmatchcase(test, pattern) for pattern in known["tests"])]
    return found[0] if found else None


def compare(directory, setup, least):
    """Prints the differences of a setup; returns the faults."""
    differing, passed = differences(directory, setup)
    again = outcomes(directory, setup, "again")
    unsteady, unknown = [], []
    for test in differing:
        if why := reason(test):
            print(f"   known     {test}\n             {why}")
        elif again.get(test) == "passed":
            unsteady.append(test)
            print(f"   unsteady  {test}: failed once, passed when it was run again")
        else:
            unknown.append(test)
            print(f"   DIFFERS   {test}")
    print(
        f"{setup}: {passed} tests pass with Python's worker, {passed - len(differing)} of them with ours;"
        f" {len(unsteady)} are unsteady, {len(unknown)} differ"
    )
    faults = [f"{setup}: {len(unknown)} tests differ"] if unknown else []
    if len(unsteady) > MOST_UNSTEADY:
        faults.append(f"{setup}: more than {MOST_UNSTEADY} tests are unsteady")
    if passed < least:
        faults.append(f"{setup}: fewer than {least} tests pass with Python's worker; see the logs of pytest (SUITE_KEEP)")
    return faults


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("setups", nargs="+")
    arguments.add_argument("--least", type=int)
    arguments.add_argument("--failed", action="store_true")
    given = arguments.parse_args()
    if given.failed:
        [setup] = given.setups
        print("\n".join(test for test in differences(given.directory, setup)[0] if not reason(test)))
        return 0
    faults = [f"more than {MOST_KNOWN} known differences"] if len(KNOWN) > MOST_KNOWN else []
    for setup in given.setups:
        faults += compare(given.directory, setup, LEAST[setup] if given.least is None else given.least)
    for fault in faults:
        print(f"FAILURE: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
