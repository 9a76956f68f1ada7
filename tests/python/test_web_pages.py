"""The status page in a real browser."""

import asyncio
import threading
import time

import pytest
from selenium.webdriver.common.keys import Keys

from browser import Browser
from support import MB, Process, clean_environment, service, until
from test_health import free_port

VIEWERS = 200
#: Would add elements to a page, and be displayed as another name.
HOSTILE = "<img src=x onerror=document.title='bad'>&amp;\"'\u202egpj.tar"
SHOWN = "<img src=x onerror=document.title='bad'>&amp;\"'\\u{202e}gpj.tar"


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def web(shared_deployment):
    """The address of the page, below a base path."""
    port = free_port()
    process = Process(
        [service("CCAT_TRANSFER_BIN"), "--config", shared_deployment.config, "web"]
        + ["--listen", f"127.0.0.1:{port}", "--base-path", "/status"],
        shared_deployment.directory / "web.log",
        cwd=shared_deployment.directory,
        env=clean_environment(),
    )
    shared_deployment.processes.append(process)
    process.says(str(port))
    return f"http://127.0.0.1:{port}/status"


@pytest.fixture(scope="module")
def history(shared_deployment):
    """The ids of a completed transfer, and of a failed one with a hostile name."""
    deployment = shared_deployment
    deployment.worker()
    completed = deployment.package()
    failed = deployment.package(HOSTILE)
    (deployment.origin / HOSTILE).unlink()
    deployment.schedule()
    deployment.reaches(completed, "COMPLETED")
    deployment.reaches(failed, "FAILED")
    return completed, failed


def pages(web, deployment, history):
    link = f"{deployment.origin_site}/{deployment.destination_site}"
    paths = ["/", f"/links/{link}", *(f"/transfers/{id}" for id in history)]
    return [web + path for path in [*paths, "/transfers?status=failed&status=completed", "/transfers?since=never"]]


def test_progress_is_visible_and_ends(browser, web, shared_deployment, history):
    deployment = shared_deployment
    deployment.double(PLAN="reset@30%;ok", RATE=2 * MB)
    browser.get(web + "/")
    browser.run("window.isTheSamePage = true")
    transfer = deployment.package(size=6 * MB)
    deployment.schedule()
    seen = set()

    def copied():
        seen.update(browser.run("return [...document.querySelectorAll('#running progress')].map((bar) => bar.value)"))
        if deployment.status(transfer) == "PENDING":
            deployment.schedule()
        return deployment.status(transfer) == "COMPLETED"

    until(copied, "the second attempt completes", 60)
    assert len(seen) > 1, f"the bar moves: {seen}"
    browser.shows("No copy runs", "#running")
    assert browser.run("return window.isTheSamePage"), "without a reload"
    browser.get(f"{web}/transfers/{transfer}")
    attempts = [item.text for item in browser.all(".timeline > li")]
    assert len(attempts) == 2, attempts
    assert attempts[0].startswith("Failed, another attempt follows"), attempts
    assert attempts[1].startswith("Completed"), attempts
    assert "Completed" in browser.text(".verdict")


def test_a_hostile_name_is_text(browser, web, shared_deployment, history):
    _, failed = history
    for path in ["/", "/transfers?status=failed", f"/transfers/{failed}"]:
        browser.get(web + path)
        browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
        assert SHOWN in browser.text(), path
        assert browser.all("img") == []
        assert "bad" not in browser.driver.title
        assert browser.errors() == []


def test_the_overview_says_what_to_do(browser, web, history):
    _, failed = history
    browser.get(web + "/")
    assert "Action required" in browser.text("#verdict")
    problem = browser.text("#problems")
    assert "origin_missing" in problem and "What to do" in problem
    command = browser.one("#problems .problem .command code").text
    assert command.startswith("ccat-transfer ")
    button = browser.one("#problems .problem .command button")
    button.click()
    until(lambda: button.text != "Copy", "the button confirms")
    browser.one("#problems .problem summary").click()
    browser.one(f"#problems .problem a[href$='/transfers/{failed}']").click()
    browser.shows(f"Transfer {failed}", "h1")


def test_the_pages_say_why_a_transfer_waits(browser, web, shared_deployment, history):
    deployment = shared_deployment
    link = (deployment.origin_site, deployment.destination_site)
    deployment.cli("links", "pause", *link, "--reason", "<b>observing</b>")
    try:
        waits = deployment.package()
        browser.get(f"{web}/transfers/{waits}")
        assert browser.text(".verdict").startswith("Pending: its link")
        assert "<b>observing</b>" in browser.text(".verdict")
        browser.get(web + "/")
        browser.shows("<b>observing</b>", "#links")
        assert "links resume " + " ".join(link) in browser.text("#links .command")
    finally:
        deployment.cli("links", "resume", *link)


def test_without_script(browser, web, history):
    completed, failed = history
    with browser.without_script():
        browser.get(web + "/")
        assert browser.all("#problems button") == []
        assert browser.all(".plot svg rect") != []
        assert "load this page again" in browser.text("main")
        browser.one("nav a[href$='/transfers']").click()
        browser.one("#package").send_keys("gpj")
        browser.one("form button").click()
        assert f"Transfer {failed}" in browser.text("table")
        assert f"Transfer {completed}" not in browser.text("table")
        browser.one("tbody a").click()
        assert SHOWN in browser.text(".facts")


def test_at_360_pixels(browser, web, shared_deployment, history):
    with browser.width(360):
        for page in pages(web, shared_deployment, history):
            browser.get(page)
            browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
            wide = browser.run("return document.documentElement.scrollWidth")
            assert wide <= 360, f"{page} is {wide} pixels wide"


def test_accessible(browser, web, shared_deployment, history):
    for page in pages(web, shared_deployment, history):
        browser.get(page)
        browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
        for scheme in ["light", "dark"]:
            with browser.colours(scheme):
                assert browser.findings() == [], f"{page}, {scheme}"


def test_with_the_keyboard(browser, web, history):
    browser.get(web + "/")
    browser.press(Keys.TAB)
    assert browser.focused().text == "Skip to the content"
    browser.press(Keys.ENTER)
    assert browser.focused().get_attribute("id") == "content"
    summary = browser.one("#problems .problem summary")
    for _ in range(40):
        browser.press(Keys.TAB)
        if browser.focused() == summary:
            break
    browser.press(Keys.ENTER)
    assert browser.one("#problems .problem details").get_attribute("open"), "it unfolds"


class Viewers:
    """Many readers of the events."""

    def __init__(self, address, count):
        self.address, self.count, self.events = address, count, [0] * count
        self.thread = threading.Thread(target=lambda: asyncio.run(self.watch_all()), daemon=True)
        self.thread.start()

    async def watch_all(self):
        self.ending = asyncio.Event()
        viewers = [asyncio.create_task(self.watch(n)) for n in range(self.count)]
        self.loop = asyncio.get_running_loop()
        await self.ending.wait()
        for viewer in viewers:
            viewer.cancel()

    async def watch(self, number):
        host, _, path = self.address.removeprefix("http://").partition("/")
        name, _, port = host.partition(":")
        reader, writer = await asyncio.open_connection(name, int(port))
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        try:
            while line := await reader.readline():
                self.events[number] += line.startswith(b"event:")
        finally:
            writer.close()

    def close(self):
        self.loop.call_soon_threadsafe(self.ending.set)
        self.thread.join(20)


def test_viewers_do_not_slow_copies(web, shared_deployment, history):
    deployment = shared_deployment

    def seconds_of_a_copy():
        deployment.double(RATE=4 * MB)
        transfer = deployment.package(size=12 * MB)
        deployment.schedule()
        began = time.monotonic()
        deployment.reaches(transfer, "COMPLETED", 120)
        return time.monotonic() - began

    alone = seconds_of_a_copy()
    viewers = Viewers(f"{web}/events", VIEWERS)
    try:
        # Each of them has the six sections.
        until(lambda: min(viewers.events) >= 6, "every viewer has the page", 60)
        before = list(viewers.events)
        watched = seconds_of_a_copy()
        until(lambda: all(now > then for now, then in zip(viewers.events, before)), "every viewer sees it", 30)
    finally:
        viewers.close()
    # Wide, for busy machines.
    assert watched < 1.5 * alone + 5, (alone, watched)
