"""terminal_svg.py PICTURE [FROM=TO…] -- COMMAND…: runs a command on a pseudo-terminal and draws what it prints.

Paths that only this run has can be shown as others. What cannot be drawn (anything but text and colours) is an error.
"""

import html
import os
import pty
import re
import sys

WIDTH, CHAR, LINE, MARGIN = 132, 7.5, 18, 16
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "2": "#8b949e"}
PLAIN, GROUND = "#e6edf3", "#0d1117"


def printed(command):
    """Output of a command on a terminal; the command may fail."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.execvp(command[0], command)
    chunks = []
    try:
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    except OSError:  # the other end is closed
        pass
    os.waitpid(pid, 0)
    return b"".join(chunks).decode().replace("\r\n", "\n")


def cells(text):
    """Lines of (character, colour). Long lines are broken at a blank and continue below their text."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        colour, row = PLAIN, []
        for code, char in re.findall(r"\x1b\[([0-9]*)m|(.)", line):
            if char:
                row.append((char, colour))
            elif code in ("", "0"):
                colour = PLAIN
            else:
                colour = COLOURS[code]
        indent = [(" ", PLAIN)] * 27
        while len(row) > WIDTH:
            cut = max((n for n in range(40, WIDTH) if row[n][0] == " "), default=WIDTH)
            lines.append(row[:cut])
            row = indent + row[cut:][1:]
        lines.append(row)
    return lines


def drawn(lines, title):
    width, height = 2 * MARGIN + WIDTH * CHAR, 2 * MARGIN + (len(lines) + 2) * LINE
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="monospace" font-size="12.5">',
        f'<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>',
    ]
    for number, row in enumerate([[(c, PLAIN) for c in f"$ {title}"], [], *lines]):
        y, at = MARGIN + (number + 0.8) * LINE, 0
        while at < len(row):
            end = next((n for n in range(at, len(row)) if row[n][1] != row[at][1]), len(row))
            text = "".join(char for char, _ in row[at:end])
            if text.strip():
                blanks = len(text) - len(text.lstrip(" "))
                x = MARGIN + (at + blanks) * CHAR
                shown = text.strip(" ")
                out.append(
                    f'<text x="{x:.1f}" y="{y:.1f}" fill="{row[at][1]}" textLength="{len(shown) * CHAR:.1f}" '
                    f'xml:space="preserve">{html.escape(shown)}</text>'
                )
            at = end
    return "\n".join([*out, "</svg>", ""])


def main():
    picture, *rest = sys.argv[1:]
    split = rest.index("--")
    text = printed(rest[split + 1 :])
    for name in rest[:split]:
        before, _, after = name.partition("=")
        text = text.replace(before, after)
    with open(picture, "w") as file:
        file.write(drawn(cells(text), "ccat-transfer doctor"))


main()
