"""Headless Chromium, driven by Selenium. Both programs are Debian's: chromium and chromium-driver."""

import contextlib
import os
import shutil

from selenium_axe_python import Axe
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from support import until


def chromium():
    """The path of Debian's program; the tests do not download a browser."""
    return shutil.which("chromium") or "/usr/bin/chromium"


class Browser:
    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium()
        options.add_argument("--headless=new")
        # A container's /dev/shm is small.
        options.add_argument("--disable-dev-shm-usage")
        options.add_argument("--disable-gpu")
        options.add_argument("--no-first-run")
        options.add_argument("--disable-background-networking")
        if os.geteuid() == 0:  # Chromium's sandbox refuses root
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = shutil.which("chromedriver") or "/usr/bin/chromedriver"
        self.driver = webdriver.Chrome(service=Service(driver), options=options)
        self.driver.set_page_load_timeout(30)
        self.get = self.driver.get

    def close(self):
        self.driver.quit()

    def devtools(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    @contextlib.contextmanager
    def width(self, pixels, height=800, scale=1):
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=scale, mobile=True
        )
        try:
            yield
        finally:
            self.devtools("Emulation.clearDeviceMetricsOverride")

    @contextlib.contextmanager
    def without_script(self):
        self.devtools("Emulation.setScriptExecutionDisabled", value=True)
        try:
            yield
        finally:
            self.devtools("Emulation.setScriptExecutionDisabled", value=False)

    @contextlib.contextmanager
    def colours(self, scheme):
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        try:
            yield
        finally:
            self.devtools("Emulation.setEmulatedMedia", features=[])

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        found = self.all(selector)
        assert len(found) == 1, f"{len(found)} elements are {selector} in:\n{self.text()}"
        return found[0]

    def text(self, selector="body"):
        """What a reader sees, in one element."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def shows(self, text, selector="body", seconds=30):
        until(lambda: text in self.text(selector), f"{text!r} in {selector}", seconds, log=lambda: self.text(selector))

    def press(self, *keys):
        """Presses keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.driver.switch_to.active_element

    def findings(self):
        """Serious findings of axe in the page, each as one line."""
        axe = Axe(self.driver)
        axe.inject()
        return [
            f"{found['id']} ({found['impact']}): {found['help']}: {[node['html'][:200] for node in found['nodes'][:3]]}"
            for found in axe.run()["violations"]
            if found["impact"] in ("serious", "critical")
        ]

    def errors(self):
        """Errors in the browser's console since the last call, such as violations of the security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
