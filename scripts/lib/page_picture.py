"""Pictures of the status page after a night with failures: page_picture.py SITE_DIRECTORY IMAGES_DIRECTORY

Called by scripts/page-picture.sh, which makes the two sites and the database.
"""

import base64
import datetime
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))
from browser import Browser  # noqa: E402
from support import MB, Process, clean_environment, service, until  # noqa: E402
from test_health import free_port  # noqa: E402

GIB = 1024**3
HOUR = 3600
#: Where the night's failures end for good: status, code and message of the last attempt.
GIVEN_UP = {
    "origin_missing": "{path} is missing at the origin; restore it, or correct the path of the package in the database",
    "destination_denied": "{path} cannot be written at the destination; check permissions: bbcp: Permission denied",
}


class Night:
    """The transfers of the last 24 hours, as rows of the database."""

    def __init__(self, database):
        self.database = sqlite3.connect(database, timeout=20)
        self.now = datetime.datetime.now(datetime.timezone.utc)
        self.random = random.Random(1)
        rows = self.database.execute("SELECT s.short_name, l.id FROM data_location l JOIN site s ON s.id = l.site_id")
        self.locations = dict(rows)

    def at(self, hours_ago):
        return self.now - datetime.timedelta(hours=hours_ago)

    def transfer(self, link, name, size, status, hours_ago, error=None, retries=0):
        """Returns the id of a new transfer and the path of its package."""
        path = f"packages/{name}"
        cursor = self.database.execute(
            "INSERT INTO data_transfer_package (file_name, relative_path, size, status) VALUES (?, ?, ?, 'TRANSFERRING')",
            (name, path, size),
        )
        ended = self.stamp(hours_ago - 0.2) if status in ("COMPLETED", "FAILED") else None
        message = error and GIVEN_UP.get(error, "{path}: no connection").format(path=path)
        cursor = self.database.execute(
            "INSERT INTO data_transfer (data_transfer_package_id, origin_location_id, destination_location_id, status,"
            " retry_count, unpack_status, created_at, start_time, end_time, failure_error_message)"
            " VALUES (?, ?, ?, ?, ?, 'PENDING', ?, ?, ?, ?)",
            (cursor.lastrowid, *(self.locations[site] for site in link), status, retries)
            + (self.stamp(hours_ago + 0.5), self.stamp(hours_ago), ended, message),
        )
        return cursor.lastrowid, path

    def stamp(self, hours_ago):
        return self.at(hours_ago).strftime("%Y-%m-%d %H:%M:%S")

    def attempt(self, id, number, outcome, hours_ago, size=None, error=None, message=None):
        seconds = 600 + self.random.random() * 300
        began = self.at(hours_ago)
        ended = began + datetime.timedelta(seconds=seconds)
        self.database.execute(
            "INSERT INTO transfer_worker_attempt (data_transfer_id, attempt, task_id, worker, started_at, ended_at,"
            " outcome, error_code, message, bytes, rate_bytes_per_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (id, number, f"task-{id}-{number}", "celery@transfer1", began.isoformat(), ended.isoformat(), outcome, error)
            + (message, size, size and int(size / seconds)),
        )

    def write(self):
        for n in range(90):
            # Little by day, much at night, almost nothing while the network is down.
            hours_ago = 23.5 - n * 0.26
            link = ("ccat", "cologne") if n % 3 else ("cologne", "cornell")
            size = int(GIB * (4 + 20 * self.random.random()) * (2 if 6 < hours_ago < 16 else 1))
            is_down = 8 < hours_ago < 10 and link[0] == "ccat"
            id, path = self.transfer(link, f"night-{n + 1:03}.tar", size, "COMPLETED", hours_ago - 2 * is_down)
            number = 1
            while is_down and number < 3:
                self.attempt(id, number, "retried", hours_ago - number * 0.3, error="network")
                number += 1
            self.attempt(id, number, "completed", hours_ago - 2 * is_down, size=size)
        for n, error in enumerate(["origin_missing", "origin_missing", "destination_denied"]):
            id, path = self.transfer(("ccat", "cologne"), f"calibration-{n + 1}.tar", 3 * GIB, "FAILED", 7 + n, error)
            self.attempt(id, 1, "failed", 7 + n, error=error, message=GIVEN_UP[error].format(path=path))
        later = self.now + datetime.timedelta(minutes=25)
        for n in range(2):
            id, path = self.transfer(("cologne", "cornell"), f"night-{n + 101}.tar", 9 * GIB, "PENDING", 0.5, "storage_low", 1)
            text = "/data/cornell has 812 GiB bytes free where 1200 are needed (with the margin); make room"
            self.attempt(id, 1, "retried", 0.5, error="storage_low", message=text)
            self.database.execute(
                "INSERT INTO transfer_worker_delay (data_transfer_id, not_before, retry_count, error_code) VALUES (?, ?, ?, ?)",
                (id, later.isoformat(), 1, "storage_low"),
            )
        self.database.commit()
        self.database.close()


def picture(browser, out, width, height):
    """A picture of the page from its top."""
    shot = browser.devtools("Page.captureScreenshot", format="png", clip=dict(x=0, y=0, width=width, height=height, scale=1))
    out.write_bytes(base64.b64decode(shot["data"]))


def main(directory, images):
    Night(directory / "ops.sqlite").write()
    program = [service("CCAT_TRANSFER_BIN"), "--config", directory / "config.toml"]

    def start(name, *arguments):
        environment = clean_environment(NO_COLOR=1)
        return Process([*program, *arguments], directory / f"{name}.log", cwd=directory, env=environment)

    processes, browser = [], None
    try:
        processes.append(start("worker", "worker", "--site", "ccat", "-n", "celery@transfer1", "-c", "3").says("worker ready"))
        processes.append(start("manager", "manager"))
        port = free_port()
        processes.append(start("web", "web", "--listen", f"127.0.0.1:{port}").says(str(port)))
        for n, size in enumerate([128, 112, 96]):
            path = directory / "ccat" / "packages" / f"night-{n + 91:03}.tar"
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(size * MB)
            ends = ["--from", "ccat/buffer", "--to", "cologne/buffer"]
            create = ["transfers", "create", "--package", path.relative_to(directory / "ccat"), *ends]
            subprocess.run([*program, *create], check=True, cwd=directory, stdout=subprocess.DEVNULL, env=clean_environment())
        browser = Browser()
        browser.get(f"http://127.0.0.1:{port}/")
        values = "return [...document.querySelectorAll('#running progress')].map((bar) => bar.value)"
        until(lambda: sum(value > 20 for value in browser.run(values)) == 3, "three copies are well under way", 90)
        for name, width, height, scheme in [("page", 1200, 1620, "light"), ("page-phone", 360, 900, "dark")]:
            with browser.width(width, height), browser.colours(scheme):
                picture(browser, images / f"{name}.png", width, height)
    finally:
        if browser:
            browser.close()
        for process in reversed(processes):
            process.stop()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]), Path(sys.argv[2]))
