"""The app of the Python worker that Celery's own tests run against; see suite_workers.py."""

import json
import os

from celery import Celery

app = Celery("suite")
app.conf.update(json.loads(os.environ["SUITE_SETTINGS"]))
app.set_default()

from celery.contrib.testing import tasks  # noqa: E402, F401
from t.integration.tasks import ClassBasedAutoRetryTask  # noqa: E402
from t.smoke import tasks as smoke  # noqa: E402, F401

app.register_task(ClassBasedAutoRetryTask())
