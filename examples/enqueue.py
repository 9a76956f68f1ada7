#!/usr/bin/env python3
"""Send a task to the transfer worker with Python Celery, like `cargo run --example enqueue` in Rust.

    enqueue.py transfer_files_bbcp --id 42 --queue ccat_buffer_data_transfer --wait
    enqueue.py transfer_transfer_packages --verbose

The worker's code is not necessary: tasks are sent by name. The broker is CELERY_BROKER_URL. With --wait the
result comes from CELERY_RESULT_BACKEND, or directly from the worker (rpc://) if that is not set.

Prints the task id, and with --wait the state and the result, or the exception and its message. Exit code 0,
or 1 if the task could not be sent, failed, or returned no result in time.
"""

import argparse
import os
import sys

from celery import Celery
from celery.exceptions import TimeoutError as NoResult
from kombu.exceptions import OperationalError

MODULE = "ccat_data_transfer.transfer_manager"


def arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--queue", metavar="Q", help="the queue to send to (default: celery)")
    common.add_argument(
        "--wait",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=float("inf"),
        help="wait for the result, for SECONDS at most",
    )
    parser = argparse.ArgumentParser(description="Send a task to the transfer worker.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    copy = tasks.add_parser("transfer_files_bbcp", parents=[common], help="move one package")
    copy.add_argument("--id", type=int, required=True, help="the data transfer's id")
    scan = tasks.add_parser("transfer_transfer_packages", parents=[common], help="schedule what is pending")
    scan.add_argument("--verbose", action="store_true", help="log at level DEBUG")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    waits = options.wait is not None
    app = Celery(
        broker=os.environ.get("CELERY_BROKER_URL") or "amqp://guest:guest@127.0.0.1:5672//",
        backend=os.environ.get("CELERY_RESULT_BACKEND") or ("rpc://" if waits else None),
        set_as_current=False,
    )
    app.conf.broker_connection_timeout = 4

    if options.task == "transfer_files_bbcp":
        args, kwargs = [options.id], {}
    else:
        args, kwargs = [], {"verbose": options.verbose}

    try:
        result = app.send_task(f"{MODULE}.{options.task}", args, kwargs, queue=options.queue)
    except OperationalError as error:
        print(f"broker {app.connection().as_uri()}: {error}", file=sys.stderr)
        return 1
    print(result.id, flush=True)
    if not waits:
        return 0

    try:
        value = result.get(timeout=None if options.wait == float("inf") else options.wait)
    except NoResult:
        print(f"no result within {options.wait:g} s", file=sys.stderr)
        return 1
    except Exception as error:  # the exception of the task, which Celery creates again here under its name
        print(f"{result.state} {type(error).__name__}: {error}")
        return 1
    print(f"{result.state} {value!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
