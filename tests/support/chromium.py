"""A real Chromium, driven by Selenium, for tests of the web pages."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

SECONDS = 20
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage"
)


def why_not() -> str | None:
    """Say why this machine cannot run a browser, or return None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{', '.join(missing)} not found: apt-get install chromium chromium-driver" if missing else None


class Browser:
    """A headless Chromium with a new profile in `folder`."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in [*FLAGS.split(), f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(SECONDS)

    def open(self, url: str, width: int = 1280, height: int = 900, **media: str) -> None:
        """Open a page in a window of this size, with media features such as prefers_color_scheme="dark".

        Messages and requests of earlier pages are forgotten.
        """
        self.resize(width, height, **media)
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        self.driver.get(url)

    def resize(self, width: int, height: int, **media: str) -> None:
        """Set the window's size in CSS pixels. A width below 600 imitates a phone."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.command("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.command("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        """Return the first element that matches a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        """Return all elements that match a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, script: str, *arguments: Any) -> Any:
        """Wait until a JavaScript expression is true, and return its value. Raises after `SECONDS` seconds."""
        return WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: self.run(script, *arguments), script)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of a JavaScript expression. A promise is awaited."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def screenshot(self, path: Path) -> None:
        """Write the whole page, also what is not visible in the window, to a PNG file."""
        shot = self.command("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """Return the URLs that the browser requested since the page was opened."""
        entries = self.driver.get_log("performance")  # type: ignore[no-untyped-call]
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Return the console's messages since the page was opened: errors, violations of the security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def quit(self) -> None:
        """End the browser and its driver."""
        self.driver.quit()
