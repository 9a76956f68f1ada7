"""A flame graph of our worker under load: python -m scripts.bench.flame OUT.svg

Called by scripts/flame.sh. The tasks do nothing and come from a full queue, with -c 64, prefetch 128 and rpc://. The graph
shows processor time (perf's cpu-clock) including the kernel; the width of a frame is its share of all samples.
"""

import collections
import html
import re
import subprocess
import sys
import tempfile

from .sides import bench, broker_uri, running
from .workers import delete, names, rust

WIDTH, ROW, MARGIN = 1400, 17, 10
TASKS = 60_000
# Minimum width of a drawn frame, and width of a letter, in pixels.
NARROW, LETTER = 0.4, 6.3
# Owners of the code of a frame, with colours; the first match counts.
OWNERS = (
    ("the kernel", "#bf8f8f", lambda frame, dso: "kernel" in dso or "vdso" in dso),
    ("ours", "#88b0d0", lambda frame, dso: any(crate in frame for crate in ("ccat_transfer", "ccat_bench", "celery_worker", "celery_protocol", "service_connection"))),
    ("lapin and AMQP", "#a3be8c", lambda frame, dso: re.search(r"lapin|amq_protocol|nom::|cookie_factory", frame)),
    ("tokio and futures", "#d9c58b", lambda frame, dso: re.search(r"tokio|futures|parking_lot|mio::|flume", frame)),
    ("the C library: memory", "#c79bc4", lambda frame, dso: "libc" in dso or re.match(r"_*(GI_|libc_|int_(malloc|free)|mem(cpy|move|set|cmp)|malloc|free$)", frame)),
    ("other", "#c8ccd4", lambda frame, dso: True),
)
# Standard library: its frames count as the owner of their caller.
STANDARD = re.compile(r"[<&(]*(core|alloc|std|hashbrown)::")


def owner_of(name, dso, caller):
    """The entry of OWNERS for a frame; `caller` is the entry of the calling frame."""
    if STANDARD.match(name):
        return caller
    return next(owner for owner in OWNERS if owner[2](name, dso))


class Frame:
    def __init__(self):
        self.samples = 0
        self.children = collections.defaultdict(Frame)

    def depth(self):
        return 1 + max((child.depth() for child in self.children.values()), default=0)


def record(data):
    """Records perf's samples of the worker while it runs the tasks; returns the tasks per second."""
    queue, replies = names()
    bench("fill", "--queue", queue, "--reply-to", replies, "--count", TASKS)
    try:
        command, environment = rust(queue, 64, 2)
        with running(command, environment) as process:
            perf = ["perf", "record", "-q", "-F", "499", "-e", "cpu-clock", "--call-graph", "dwarf,8192", "-p", str(process.pid), "-o", data]
            with subprocess.Popen([*perf, "--", "sleep", "4"], stderr=subprocess.DEVNULL) as recorder:
                figures = bench("watch", "--queue", replies, "--count", TASKS)
                recorder.wait()
        return figures["per_second"]
    finally:
        delete(queue, replies)


def stacks(data):
    """The samples as stacks, outermost frame first, each frame with the object it is in."""
    command = ["perf", "script", "-i", data, "-F", "comm,ip,sym,dso"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
    for sample in text.split("\n\n"):
        lines = sample.strip("\n").splitlines()
        if len(lines) < 2:
            continue
        frames = [(lines[0].strip(), "")]
        for line in reversed(lines[1:]):
            found = re.match(r"\s*[0-9a-f]+ (.*) \((.*)\)$", line)
            if found and found[1] != "[unknown]":
                frames.append((found[1], found[2]))
        yield frames


def tree(samples):
    root = Frame()
    for frames in samples:
        root.samples += 1
        at = root
        for frame in frames:
            at = at.children[frame]
            at.samples += 1
    return root


def short(name):
    """A symbol without its hash and without its generic arguments."""
    name = re.sub(r"::h[0-9a-f]{16}$", "", name)
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return name.replace("{{closure}}", "{}").strip(":") or "?"


def draw(root, rate):
    height = MARGIN * 2 + ROW * (root.depth() + 2)
    unit = (WIDTH - 2 * MARGIN) / root.samples
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" font-family="monospace" font-size="10.5">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    title = f"ccat-transfer's worker at {rate:,.0f} no-op tasks a second: time on a processor, {root.samples:,} samples"
    parts.append(f'<text x="{MARGIN}" y="{MARGIN + 10}" font-size="12.5">{html.escape(title)}</text>')
    x = MARGIN
    for owner, colour, _ in OWNERS:
        parts.append(f'<rect x="{x}" y="{MARGIN + ROW}" width="12" height="12" fill="{colour}"/><text x="{x + 16}" y="{MARGIN + ROW + 10}">{owner}</text>')
        x += 40 + LETTER * len(owner)

    def frame(node, x, row, caller):
        for (name, dso), child in sorted(node.children.items()):
            width = child.samples * unit
            if width >= NARROW:
                owner = owner_of(name, dso, caller)
                colour = owner[1] if row else "#e5e7eb"
                y = height - MARGIN - ROW * (row + 1)
                label = short(name) if row else name
                text = html.escape(f"{label}: {child.samples / root.samples:.1%}")
                parts.append(f'<g><title>{text}</title><rect x="{x:.1f}" y="{y}" width="{max(width - 0.3, 0.3):.1f}" height="{ROW - 1}" fill="{colour}"/>')
                letters = int((width - 4) / LETTER)
                if letters >= 4:
                    shown = label if len(label) <= letters else "…" + label[-(letters - 1) :]
                    parts.append(f'<text x="{x + 2:.1f}" y="{y + 12}">{html.escape(shown)}</text>')
                parts.append("</g>")
                frame(child, x, row + 1, owner)
                x += width
            else:
                x += width

    frame(root, MARGIN, 0, OWNERS[-1])
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    [out] = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="ccat-flame-") as directory:
        data = f"{directory}/perf.data"
        rate = record(data)
        root = tree(stacks(data))
    with open(out, "w") as file:
        file.write(draw(root, rate))
    print(f"{root.samples} samples from {broker_uri().rpartition('@')[2]} at {rate:,.0f} tasks a second: {out}")
    for owner in OWNERS:
        print(f"{share(root, owner):6.1%}  {owner[0]}")


def share(root, owner):
    """Share of the samples whose innermost frame belongs to `owner`."""

    def own(node, of):
        mine = node.samples - sum(child.samples for child in node.children.values())
        return (mine if of is owner else 0) + sum(own(child, owner_of(*key, of)) for key, child in node.children.items())

    return own(root, OWNERS[-1]) / root.samples


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main()
