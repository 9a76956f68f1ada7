"""Every command of the documentation is run as written, or is marked as not run here.

The fenced blocks of the language `sh` are run: all blocks of a page in order, in one shell, in an empty directory, with a
broker and a PATH with ccat-transfer and bbcp, and no other preparation. `sh build` and `sh not-run` are not run: the first
are part of scripts/test.sh anyway, the second need hosts or systems that do not exist here.
"""

import itertools
import os
import pathlib
import re
import subprocess
import tomllib

import pytest

from support import clean_environment, service

REPO = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(.*)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page):
    """The fenced blocks of a page: first line's number, info string, text."""
    inside, found = None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside = (number, fence[2].strip(), fence[1], [])
        elif inside and line.strip() == "```":
            found.append((inside[0], inside[1], "\n".join(inside[3])))
            inside = None
        elif inside:
            inside[3].append(line.removeprefix(inside[2]))
    assert inside is None, f"{page}: the block of line {inside[0]} does not end"
    return found


def runnable(page):
    return [(number, text) for number, info, text in blocks(page) if info == "sh"]


def test_every_block_of_commands_is_marked():
    for page in PAGES:
        for number, info, _ in blocks(page):
            language, *rest = info.split() or [""]
            assert language not in ("bash", "shell", "console", ""), f"{page}:{number}: `{info}`; commands are `sh`, output is `text`"
            if language == "sh":
                assert rest in ([], ["build"], ["not-run"]), f"{page}:{number}: `{info}`"


def anchors(page):
    """The anchors of the headings of a page, as GitHub and mdbook make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text()), re.M)
    texts = [re.sub(r"\]\([^)]*\)", "", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in texts}


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            if "://" not in target:
                path, _, anchor = target.partition("#")
                found = (page.parent / path).resolve() if path else page
                assert found.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_links_of_the_book_stay_in_the_book():
    """mdbook makes the book of docs/ alone: a link out of it would be broken there."""
    for page in (REPO / "docs").rglob("*.md"):
        for target in LINK.findall(page.read_text()):
            path = (page.parent / target.split("#")[0]).resolve()
            assert "://" in target or path.is_relative_to(REPO / "docs"), f"{page}: {target}"


def spans(text):
    """The text between backticks, outside of blocks."""
    outside = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


def page_text(name):
    return (REPO / "docs" / name).read_text()


def test_names_in_troubleshooting_exist():
    """Error codes, messages and commands. Rust's tests compare the first two lists with the source."""
    text = page_text("troubleshooting.md")
    codes = set(re.findall(r"^### `(\w+)`$", page_text("failures.md"), re.M))
    (table,) = re.findall(r"^\| code or text .*\n(?:\|.*\n)+", text, re.M)
    named = re.findall(r"^\| `([^`]+)`", table, re.M) + re.findall(r"--error (\w+)", text)
    assert len(named) > 3 and set(named) <= codes, set(named) - codes

    sentences = {span for span in spans(text) if " " in span}
    ours = {words for words in sentences if re.match(r"(ccat-transfer|transfers) ", words)}
    others = {words for words in sentences if re.match(r"(celery|ssh|python3) ", words)}
    events = re.findall(r"^\| (.+?) \| ", page_text("LOGGING.md").split("\n## Events\n")[1], re.M)
    messages = sentences - ours - others
    assert len(messages) > 3
    for message in messages:
        assert any(message in event for event in events), f"no event says `{message}`"
    for command in ours:
        words = command.removeprefix("ccat-transfer ").split()
        names = list(itertools.takewhile(re.compile("[a-z]+$").match, words))
        done = subprocess.run([service("CCAT_TRANSFER_BIN"), *names, "--help"], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, f"`{command}`: {done.stderr}"
        for option in [word for word in words if word.startswith("--")]:
            assert option in done.stdout.split(), f"`{command}`: there is no {option}"


def test_the_table_of_contents_names_every_page():
    summary = (REPO / "docs/SUMMARY.md").read_text()
    for page in PAGES:
        if page.name not in ("README.md", "SUMMARY.md"):
            assert f"({page.relative_to(REPO / 'docs')})" in summary, page


def test_compatibility_names_every_setting():
    """Every key of [celery], so that its last sentence is true: a key that is not in the list is an error."""
    known = tomllib.loads((REPO / "config.default.toml").read_text())["celery"].keys()
    named = set(spans(page_text("compatibility.md").split("\n## Settings\n")[1]))
    assert known <= named, known - named


def test_named_files_exist():
    """Paths are relative to the repository. The architecture page also names files relative to the worker's directory."""
    tops = {path.name for path in REPO.iterdir()}
    worker = REPO / "crates/celery-worker/src"
    named = 0
    for page in [*PAGES, REPO / "CONTRIBUTING.md", *REPO.glob("*/README.md"), *REPO.glob("crates/*/README.md")]:
        for span in spans(page.read_text()):
            if re.fullmatch(r"test_\w+\.py", span):
                assert (REPO / "tests/python" / span).exists(), f"{page}: {span}"
            elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+", span):
                known = page.name == "architecture.md" or span.split("/")[0] in tops - {"target"}
                assert not known or (REPO / span).exists() or (worker / span).exists(), f"{page}: {span}"
                named += known
    assert named > 100


def reachable(edges):
    """The transitive closure of a set of pairs."""
    closure = set(edges)
    while more := {(a, d) for a, b in closure for c, d in edges if b == c} - closure:
        closure |= more
    return closure


def test_the_picture_of_the_crates_shows_their_dependencies():
    folders = [REPO, REPO / "entity", REPO / "migration", *(REPO / "crates").iterdir()]
    manifests = [tomllib.loads((folder / "Cargo.toml").read_text()) for folder in folders]
    # The crates for tests are beside the arrows.
    manifests = [one for one in manifests if one["package"]["name"] not in ("hostile-inputs", "long-link")]
    names = {one["package"]["name"] for one in manifests}
    used = {(one["package"]["name"], other) for one in manifests for other in names & one["dependencies"].keys()}
    picture = (REPO / "docs/images/crates.svg").read_text()
    assert names == set(re.findall(r'font-weight="bold">([\w-]+)<', picture))
    assert reachable(used) == reachable(set(re.findall(r"<title>([\w-]+) uses ([\w-]+)</title>", picture)))


def test_modules_use_only_the_rows_below():
    """The table "The application": a module uses only modules of later rows, those of the last row also each other."""
    section = re.search(r"(?s)^## The application\n(.*?)\n## ", page_text("architecture.md"), re.M)[1]
    rows = [set(re.findall(r"`src/(\w+)(?:\.rs)?`", line.split("|")[1])) for line in section.splitlines() if line.startswith("| `")]
    modules = set().union(*rows)
    assert modules == {path.stem for path in (REPO / "src").iterdir()} - {"lib", "main"}
    for number, row in enumerate(rows):
        allowed = set().union(*rows[number + 1 :]) if number + 1 < len(rows) else row
        for module in row:
            for path in [REPO / f"src/{module}.rs", *(REPO / "src" / module).rglob("*.rs")]:
                source = path.read_text() if path.exists() else ""
                source = re.sub(r"(?m)^\s*//.*$", "", source.split("#[cfg(test)]\nmod ")[0].split("#[cfg(test)]\n#[allow")[0])
                source = re.sub(r"crate::\{([^}]*)\}", lambda uses: " ".join(f"crate::{one.strip()}" for one in uses[1].split(",")), source)
                used = set(re.findall(r"\bcrate::(\w+)", source)) & modules
                assert used <= allowed | {module}, f"{path} uses {used - allowed - {module}}"


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda page: str(page.relative_to(REPO)))
def test_commands_run_as_written(page, broker, tmp_path):
    script = ["set -euo pipefail"]
    for number, text in runnable(page):
        script += [f"echo '--- {page.name}:{number}' >&2", text]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ccat-transfer").symlink_to(service("CCAT_TRANSFER_BIN"))
    (programs / "bbcp").symlink_to(service("BBCP_DOUBLE"))
    work = tmp_path / "work"
    work.mkdir()
    environment = clean_environment(
        PATH=f"{programs}:{os.environ['PATH']}",
        HOME=str(tmp_path),
        CELERY_BROKER_URL=broker.url,
        # The commands must not depend on the free space of the machine that tests them.
        CCAT_DATA_TRANSFER_TRANSFER__FREE_SPACE_MARGIN=0,
    )
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    assert process.returncode == 0, f"{page.name}: exit code {process.returncode}\n{output}"
