"""Data on the disk before a row becomes COMPLETED: fsync, recorded and made to fail by a preloaded library."""

import subprocess

import pytest

from support import MB

# Records each fsync by path, in order, and fails for the path in FSYNC_FAILS.
SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>

static int note(int fd) {
    char link[64], path[4096], line[4200];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    const char *log = getenv("FSYNC_LOG"), *fails = getenv("FSYNC_FAILS");
    int out = log ? open(log, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (out >= 0) {
        int length = snprintf(line, sizeof line, "%s\n", path);
        if (write(out, line, length) < 0) return 0;
        close(out);
    }
    return fails && *fails && !strcmp(fails, path);
}

int fsync(int fd) {
    if (note(fd)) { errno = EIO; return -1; }
    return syscall(SYS_fsync, fd);
}

int fdatasync(int fd) {
    if (note(fd)) { errno = EIO; return -1; }
    return syscall(SYS_fdatasync, fd);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return folder / "shim.so"


def run(deployment, shim, transfer, fails=""):
    """Runs a transfer and returns the paths that were written to the disk, in order."""
    log = deployment.directory / "fsync.log"
    log.unlink(missing_ok=True)
    done = deployment.cli(
        "transfers", "run", transfer, check=False, LD_PRELOAD=shim, FSYNC_LOG=log, FSYNC_FAILS=fails
    )
    paths = log.read_text().splitlines() if log.exists() else []
    return done, [path for path in paths if path.startswith(str(deployment.destination))]


def chain(deployment, path):
    """The directories of a file, up to the location's own."""
    directories = [parent for parent in path.parents if parent.is_relative_to(deployment.destination)]
    return [str(directory) for directory in directories]


def test_a_copy_is_on_the_disk(deployment, shim):
    transfer = deployment.package("2026/11/a.tar")
    path = deployment.destination / "2026" / "11" / "a.tar"
    done, paths = run(deployment, shim, transfer)
    assert done.returncode == 0, done.stderr
    # The order: the content before the rename, then the name, then each directory that was made for it.
    assert paths[0].startswith(str(path.parent / ".ccat-transfer-"))
    assert paths[1:] == chain(deployment, path)


def test_an_existing_file_is_on_the_disk(deployment, shim):
    transfer = deployment.package("2026/11/a.tar", MB)
    path = deployment.destination / "2026" / "11" / "a.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes((deployment.origin / "2026" / "11" / "a.tar").read_bytes())
    done, paths = run(deployment, shim, transfer)
    assert done.returncode == 0 and deployment.copies() == []
    assert paths == [str(path), *chain(deployment, path)]


# The name of the partial copy is not known in advance.
@pytest.mark.parametrize(
    ("there", "what"), [(True, "file"), (True, "directory"), (True, "root"), (False, "directory"), (False, "root")]
)
def test_a_disk_error_is_not_a_completed_transfer(deployment, shim, there, what):
    transfer = deployment.package("2026/a.tar", MB)
    path = deployment.destination / "2026" / "a.tar"
    if there:
        path.parent.mkdir()
        path.write_bytes((deployment.origin / "2026" / "a.tar").read_bytes())
    fails = {"file": path, "directory": path.parent, "root": deployment.destination}[what]
    done, _ = run(deployment, shim, transfer, fails)
    assert done.returncode == 1 and "fsync failed at the destination" in done.stderr
    assert deployment.row(transfer)["status"] == "PENDING"
    # The next attempt finds the file and writes it to the disk before it reports success.
    deployment.cli("transfers", "retry", transfer)
    done, paths = run(deployment, shim, transfer)
    assert done.returncode == 0, done.stderr
    assert str(fails) in paths
    deployment.assert_moved(transfer)
