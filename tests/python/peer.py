"""A real Celery worker, to compare with: its tasks have the same signatures as those of the Rust worker.

Started by the tests as `python -m celery -A peer worker`; broker and backend are in CELERY_BROKER_URL and
CELERY_RESULT_BACKEND.
"""

import builtins
import json
import os
import time

from celery import Celery
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

MODULE = "ccat_data_transfer.transfer_manager"

app = Celery("peer", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
app.conf.update(task_acks_late=True, task_track_started=True, worker_prefetch_multiplier=1)
app.conf.update(json.loads(os.environ.get("PEER_SETTINGS", "{}")))


@app.task(name=f"{MODULE}.transfer_files_bbcp", bind=True, reject_on_worker_lost=True)
def transfer_files_bbcp(self, data_transfer_id, session=None):
    """Only the binding of the arguments matters here, not their use."""


@app.task(name=f"{MODULE}.transfer_transfer_packages")
def transfer_transfer_packages(verbose=False, session=None):
    """The same for the manager's task."""


# The tasks of the Rust example tasks_worker.


@app.task(name="tasks.add")
def add(x, y):
    return x + y


@app.task(name="tasks.echo")
def echo(value):
    return value


@app.task(name="tasks.fail")
def fail(message, exc_type="ValueError"):
    raise getattr(builtins, exc_type)(message)


@app.task(name="tasks.retry", bind=True)
def retry(self, times, countdown, max_retries=3):
    if self.request.retries >= times:
        return self.request.retries
    raise self.retry(exc=OSError("temporary failure"), countdown=countdown, max_retries=max_retries)


@app.task(name="tasks.sleep")
def sleep(seconds, progress=True):
    # Sleeps in small steps, because the soft time limit needs this in a pool without processes.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
    return seconds


@app.task(name="tasks.early", acks_late=False)
def early(finish_in=None):
    """Is acknowledged before it runs, and does not end by itself."""
    while True:
        time.sleep(0.05)


@app.task(name="tasks.sleep_early", acks_late=False)
def sleep_early(seconds):
    return sleep(seconds)


@app.task(name="tasks.reject")
def reject(requeue=False):
    raise Reject("as asked", requeue=requeue)


@app.task(name="tasks.ignore")
def ignore():
    raise Ignore()


@app.task(name="tasks.update_state", bind=True)
def update_state(self, state, meta):
    self.update_state(state=state, meta=meta)
    raise Ignore()


@app.task(name="tasks.panic")
def panic():
    raise RuntimeError("as asked")


@app.task(name="tasks.request", bind=True, time_limit=60, soft_time_limit=45)
def request(self):
    properties, info = self.request.properties, self.request.delivery_info
    return {
        **{name: properties.get(name) for name in ("app_id", "message_id", "type")},
        **{name: info.get(name) for name in ("exchange", "routing_key", "priority", "redelivered")},
        "time_limit": self.request.time_limit,
        "soft_time_limit": self.request.soft_time_limit,
    }


@app.task(
    name="tasks.autoretry",
    bind=True,
    autoretry_for=(OSError,),
    dont_autoretry_for=(FileNotFoundError,),
    retry_backoff=True,
    retry_jitter=False,
    max_retries=2,
)
def autoretry(self, times, exc_type):
    if self.request.retries >= times:
        return self.request.retries
    raise getattr(builtins, exc_type)("temporary failure")


@app.task(name="tasks.guarded", bind=True)
def guarded(self, seconds, after=0.0):
    try:
        time.sleep(seconds)
        return "slept"
    except SoftTimeLimitExceeded:
        self.update_state(state="CAUGHT")
        time.sleep(after)
        return "caught"


@app.task(name="tasks.keyword_only", typing=False)
def keyword_only(x, *, y, z=5):
    return [x, y, z]
