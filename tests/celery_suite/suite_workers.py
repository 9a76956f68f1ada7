"""Workers of both kinds for Celery's own tests, each a process; see suite_plugin.py."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

KIND = os.environ["SUITE_WORKER"]
LOGS = Path(os.environ["SUITE_LOGS"])

# Where the defaults of the Rust worker differ from Celery's.
CELERYS_DEFAULTS = {"worker_prefetch_multiplier": 4, "task_track_started": False}

# Settings of the Rust worker. Others are of the client, or of Python's pools.
DEFAULTS = Path(__file__).resolve().parents[2] / "crates/celery-worker-cli/src/settings/defaults.toml"
KNOWN = tomllib.loads(DEFAULTS.read_text())["celery"] | {"task_queues": {}, "task_routes": {}}


class Worker:
    """A worker process."""

    def __init__(self, command, environment, name):
        self.hostname, self.command, self.environment = name, command, environment
        self.log = LOGS / f"{KIND}-{name.replace('@', '-')}-{uuid.uuid4().hex[:6]}.log"
        self.launch()

    def launch(self):
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_answer(self, app, seconds=30):
        """Waits until the worker answers to `ping`, which both kinds do once they consume."""
        deadline = time.monotonic() + seconds
        while not app.control.inspect(destination=[self.hostname], timeout=1).ping():
            assert self.process.poll() is None, f"the worker has ended; see {self.log}"
            assert time.monotonic() < deadline, f"the worker does not answer; see {self.log}"

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, seconds=30):
        return self.process.wait(seconds)

    def stop(self):
        """Ends the worker and its child processes."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def start(settings, name, queue, flags=(), environment=None):
    """Starts a worker with `settings`, by Celery's names, and returns at once."""
    if KIND == "python":
        command = [sys.executable, "-m", "celery", "-A", "suite_app", "worker", "-l", "INFO"]
        variables = {"SUITE_SETTINGS": json.dumps(settings, default=sorted)}
    else:
        command = [os.environ["SUITE_WORKER_BIN"]]
        settings = CELERYS_DEFAULTS | known(settings, KNOWN)
        variables = {f"CELERY_SUITE_CELERY__{key.upper()}": toml(value) for key, value in settings.items()}
    variables |= {key: str(value) for key, value in (environment or {}).items()}
    return Worker([*command, "-Q", queue, "-n", name, *(flags or ())], variables, name)


def known(settings, names):
    """The settings whose names the Rust worker knows; likewise in a table."""
    found = {
        key: known(value, names[key]) if isinstance(value, dict) and names[key] else value
        for key, value in settings.items()
        if key in names
    }
    # A table in the environment replaces the whole one of the defaults.
    return {key: value for key, value in found.items() if value != {}}


def toml(value):
    """A value of a setting, as the Rust worker reads it from the environment."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_in_table(one)}" for key, one in value.items()) + "}"
    return json.dumps(value, default=sorted)


def toml_in_table(value):
    return json.dumps(value) if isinstance(value, str) else toml(value)
