"""Compares the outcomes of Celery's own tests with both workers: the tests that pass with Python's worker and fail with ours.

    compare.py DIRECTORY SETUP…     reads SETUP-python.json, SETUP-rust.json and SETUP-again.json

Differences that known_differences.toml contains are printed with their reason. Any other one is a failure. `compare.py
DIRECTORY SETUP --failed` only prints the tests to run again.
"""

import fnmatch
import json
import sys
import tomllib
from pathlib import Path

KNOWN = tomllib.loads((Path(__file__).parent / "known_differences.toml").read_text())["difference"]
MOST_KNOWN = 5


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


def compare(directory, setup):
    """Prints the differences of a setup; returns the number of those that are not known."""
    differing, passed = differences(directory, setup)
    again = outcomes(directory, setup, "again")
    unknown = 0
    for test in differing:
        if why := reason(test):
            print(f"   known     {test}\n             {why}")
        elif again.get(test) == "passed":
            print(f"   unsteady  {test}: failed once, passed when it was run again")
        else:
            unknown += 1
            print(f"   DIFFERS   {test}")
    print(f"{setup}: {passed} tests pass with Python's worker, {passed - len(differing)} of them with ours, {unknown} differ")
    return unknown


def main():
    directory, *setups = sys.argv[1:]
    directory = Path(directory)
    if setups[-1] == "--failed":
        print("\n".join(test for test in differences(directory, setups[0])[0] if not reason(test)))
        return 0
    assert len(KNOWN) <= MOST_KNOWN, f"more than {MOST_KNOWN} known differences"
    return min(1, sum(compare(directory, setup) for setup in setups))


if __name__ == "__main__":
    sys.exit(main())
