"""Shows transfers until they are done: progress.py DATABASE SECONDS ID=TITLE…

Reads what the worker writes: the row's status, and bytes and rate from the lease. On a terminal the bars move
in place, elsewhere there is a line for each second. Exit code 1 when one fails or the time is over.
"""

import sqlite3
import sys
import time

WIDTH = 30
MB = 1000 * 1000
ROW = """
SELECT t.status, t.retry_count, t.failure_error_message, p.size, l.bytes_done, l.rate_bytes_per_s
FROM data_transfer t JOIN data_transfer_package p ON p.id = t.data_transfer_package_id
LEFT JOIN transfer_worker_lease l ON l.data_transfer_id = t.id
WHERE t.id = ?
"""


class Transfer:
    def __init__(self, id, title):
        self.id, self.title = int(id), title
        self.share, self.note, self.done, self.failed = 0.0, "", False, None

    def read(self, connection):
        row = connection.execute(ROW, (self.id,)).fetchone()
        if row is None:
            self.failed = "there is no such row"
            return
        status, retries, error, size, bytes_done, rate = row
        if status == "COMPLETED":
            self.done, self.share, self.note = True, 1.0, "done: verified and renamed"
        elif status == "FAILED" or retries:
            self.failed = error or status
        elif status == "IN_PROGRESS" and size:
            self.share = max(self.share, (bytes_done or 0) / size)
            if self.share >= 1:
                self.note = "copied, being verified"
            else:
                self.note = f"{self.share * size / MB:4.0f} of {size / MB:.0f} MB" + (
                    f", {rate / MB:.0f} MB/s" if rate else ""
                )
        else:
            self.note = {"PENDING": "waits for the manager", "SCHEDULED": "waits in the queue"}.get(status, status)

    def bar(self, wide):
        full = round(self.share * WIDTH)
        return f"   {self.id}  {self.title:{wide}}  [{'#' * full:.<{WIDTH}}] {self.share:4.0%}  {self.note}"


def main(database, seconds, *transfers):
    transfers = [Transfer(*entry.split("=", 1)) for entry in transfers]
    wide = max(len(transfer.title) for transfer in transfers)
    moving = sys.stdout.isatty()
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
    deadline, next_line, drawn = time.monotonic() + float(seconds), 0.0, False
    while True:
        for transfer in transfers:
            transfer.read(connection)
        over = all(transfer.done for transfer in transfers) or any(transfer.failed for transfer in transfers)
        over = over or time.monotonic() > deadline
        if moving:
            if drawn:
                print(f"\x1b[{len(transfers)}A", end="")
            for transfer in transfers:
                print(f"\x1b[2K{transfer.bar(wide)}")
            drawn = True
        elif over:
            for transfer in transfers:
                print(transfer.bar(wide))
        elif time.monotonic() >= next_line:
            next_line = time.monotonic() + 1
            print("   " + "     ".join(f"{t.id}: {t.share:4.0%}" for t in transfers), flush=True)
        if over:
            break
        time.sleep(0.1)
    for transfer in transfers:
        if transfer.failed:
            print(f"transfer {transfer.id} failed: {transfer.failed}", file=sys.stderr)
        elif not transfer.done:
            print(f"transfer {transfer.id} is not done after {seconds} s: {transfer.note}", file=sys.stderr)
    return 0 if all(transfer.done for transfer in transfers) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
