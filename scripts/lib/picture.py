"""A picture of `transfers watch` while three packages are copied: picture.py DIRECTORY OUT.svg

Called by scripts/picture.sh. What is drawn is what tmux says is on its screen, character by character.
"""

import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))
from support import MB, Broker, Deployment, Process, clean_environment, service, until  # noqa: E402

COLUMNS, ROWS = 143, 6
WIDTH, HEIGHT, MARGIN = 7.8, 19, 14
BACKGROUND, FOREGROUND = "#1d2129", "#d8dee9"
# The used ones of the terminal's sixteen colours.
COLOURS = {"32": "#a3be8c", "33": "#ebcb8b", "34": "#5e81ac", "36": "#88c0d0", "31": "#bf616a"}


class Screen:
    """An invisible terminal (tmux) that runs a command."""

    def __init__(self, directory, command, environment):
        self.socket = directory / "tmux"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", COLUMNS, "-y", ROWS, *command, env=environment)

    def tmux(self, *arguments, env=None):
        return subprocess.run(
            ["tmux", "-S", self.socket, *map(str, arguments)], check=True, capture_output=True, text=True, env=env
        ).stdout

    def shown(self, *flags):
        return self.tmux("capture-pane", "-p", *flags)

    def close(self):
        self.tmux("kill-server")


def runs(line):
    """Pieces of one colour: (column, text, colour)."""
    column, colour = 0, FOREGROUND
    for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
        if sgr := re.fullmatch(r"\x1b\[([0-9;]*)m", piece):
            for code in sgr[1].split(";"):
                colour = COLOURS.get(code, FOREGROUND if code in ("", "0", "39") else colour)
            continue
        for word in re.finditer(r"\S+(?: \S+)*", piece):
            yield column + word.start(), word[0], colour
        column += len(piece)


def svg(lines):
    wide, high = COLUMNS * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high}" role="img"'
        ' aria-label="ccat-transfer transfers watch: three copies, half way">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
        '<g font-family="ui-monospace,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" font-size="13">',
    ]
    for row, line in enumerate(lines):
        for column, text, colour in runs(line):
            x, y = MARGIN + column * WIDTH, MARGIN + row * HEIGHT + 14
            # The length of the text is fixed, so that columns are aligned with any font.
            parts.append(
                f'<text x="{x:.1f}" y="{y}" fill="{colour}" textLength="{len(text) * WIDTH:.1f}"'
                f' lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
            )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def main(directory, out):
    directory.mkdir()
    deployment = Deployment(directory, Path(service("BBCP_DOUBLE")).resolve(), Broker())
    screen = worker = None
    try:
        deployment.double(RATE=16 * MB)
        deployment.settings(bbcp={"streams": 16})
        program = [service("CCAT_TRANSFER_BIN"), "--config", deployment.config]
        worker = Process(
            [*program, "worker", "-Q", deployment.queue, "-n", "celery@telescope", "-c", "3"],
            directory / "worker.log",
            cwd=directory,
            env=clean_environment(),
        ).says("worker ready")
        command = "ccat-transfer transfers watch"
        watch = " ".join(map(str, [*program, "transfers", "watch", "--interval", "500ms"]))
        shell = f"printf '\\033[32m$\\033[0m {command}\\n'; exec {watch}"
        screen = Screen(directory, ["sh", "-c", shell], clean_environment(TERM="xterm-256color", LANG="C.UTF-8"))
        for night, size in enumerate([256, 224, 192], start=1):
            path = deployment.origin / f"night-{night}.tar"
            with open(path, "wb") as file:
                file.truncate(size * MB)
            deployment.transfer(path.name)
            deployment.schedule()
            time.sleep(1)
        half = lambda: re.findall(r"\b[4-6]\d% ", screen.shown())
        until(lambda: len(half()) == 3, "three copies are half way", 60)
        lines = [line.rstrip() for line in screen.shown("-e").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        out.write_text(svg(lines))
        print(screen.shown().strip())
    finally:
        if screen:
            screen.close()
        if worker:
            worker.stop()
        deployment.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
