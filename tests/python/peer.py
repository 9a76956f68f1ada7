"""A real Celery worker with tasks of the signatures that the Rust worker answers: the reality to compare with.

Started by the tests as `python -m celery -A peer worker`; broker and backend are in CELERY_BROKER_URL and
CELERY_RESULT_BACKEND.
"""

import os

from celery import Celery

MODULE = "ccat_data_transfer.transfer_manager"

app = Celery("peer", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
app.conf.update(task_acks_late=True, task_track_started=True, worker_prefetch_multiplier=1)


@app.task(name=f"{MODULE}.transfer_files_bbcp", bind=True, reject_on_worker_lost=True)
def transfer_files_bbcp(self, data_transfer_id, session=None):
    """What the arguments are for does not matter here, only how they are bound."""


@app.task(name=f"{MODULE}.transfer_transfer_packages")
def transfer_transfer_packages(verbose=False, session=None):
    """The same for the manager's task."""
