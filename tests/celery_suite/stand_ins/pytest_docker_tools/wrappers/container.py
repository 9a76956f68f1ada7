"""See the package."""

import time


def wait_for_callable(message, func, timeout=30):
    deadline = time.monotonic() + timeout
    while not func():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)
