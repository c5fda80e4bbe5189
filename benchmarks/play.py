"""Milliseconds from the click on Generate to the first character on the page of `charlm play`, in Chromium.

    python benchmarks/play.py outputs/RUN
    python benchmarks/play.py outputs/RUN outputs/OTHER --screenshots FOLDER

It needs chromium and chromedriver, such as from apt-get install chromium-driver. A click is counted until the frame in
which the browser draws the character.
"""

import argparse
import base64
import itertools
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "hide-scrollbars"),
]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PHONE = 360, 740
# Clicks, and resolves to the milliseconds until a generated character was drawn.
CLICK = """
const done = arguments[0], start = performance.now()
const seen = () => [...document.querySelectorAll('.text')].every(text => text.querySelector('span:not(.given)'))
const observer = new MutationObserver(() => {
  if (!seen()) return
  observer.disconnect()
  requestAnimationFrame(() => done(performance.now() - start))
})
observer.observe(document.getElementById('columns'), { childList: true, subtree: true })
document.querySelectorAll('.text').forEach(text => text.replaceChildren())
document.getElementById('generate').click()
"""


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.05)
    return value


class Browser:
    """Chromium without a window, by WebDriver (https://www.w3.org/TR/webdriver2/).

    Args:
        session: its address at the driver.
    """

    def __init__(self, session: str):
        self.session = session

    def ask(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(f"{self.session}{path}", json.dumps(content).encode())
        with DIRECT.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def go(self, address: str) -> None:
        self.ask("/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self.ask("/execute/sync", script=script, args=arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript that calls its last argument, and return what it passes."""
        return self.ask("/execute/async", script=script, args=arguments)

    def press(self, *keys: str) -> None:
        """Type keys, as WebDriver names them, into what has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector: str) -> None:
        """Click on an element where it is on the screen, as a person does."""
        [element] = self.ask("/element", using="css selector", value=selector).values()
        self.ask(f"/element/{element}/click")

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.ask("/goog/cdp/execute", cmd=command, params=parameters)

    def emulate(self, width: int, height: int, dark: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def complaints(self) -> list[str]:
        """Return what the browser has logged since the last call."""
        return [entry["message"] for entry in self.ask("/se/log", type="browser")]

    def picture(self, file: Path) -> None:
        with DIRECT.open(f"{self.session}/screenshot", timeout=60) as answer:
            file.write_bytes(base64.b64decode(json.load(answer)["value"]))


def programs() -> tuple[str | None, str | None]:
    """Return where Chromium and its driver are."""
    return shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@contextmanager
def browser(language: str = "en") -> Iterator[Browser]:
    """Start Chromium, with a folder of its own."""
    chromium, driver = programs()
    if not chromium or not driver:
        raise SystemExit("chromium and chromedriver are needed, such as from apt-get install chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = [f"--{flag}" for flag in [*FLAGS, f"lang={language}", f"user-data-dir={folder}/user"]]
        options = {"binary": chromium, "args": flags, "prefs": {"intl.accept_languages": language}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        log = Path(folder, "driver.log")
        with log.open("w") as file, subprocess.Popen([driver, "--port=0"], stdout=file, stderr=file) as server:
            opened = None
            try:
                port = until(lambda: re.search(r"successfully on port (\d+)", log.read_text())).group(1)
                started = Browser(f"http://127.0.0.1:{port}/session")
                found = started.ask("", capabilities={"alwaysMatch": wanted})
                opened = Browser(f"{started.session}/{found['sessionId']}")
                yield opened
            finally:
                if opened:
                    DIRECT.open(urllib.request.Request(opened.session, method="DELETE"), timeout=30).close()
                server.terminate()


@contextmanager
def page(runs: list[str]) -> Iterator[str]:
    """Serve the page by the command itself, and return its address."""
    command = [sys.executable, "-m", "charlm", "play", *runs, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            if not (found := re.search(r"http://\S+", server.stdout.readline())):
                raise SystemExit("charlm play has not started")
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)


def generated(chromium: Browser) -> None:
    """Wait until all texts are complete."""
    until(lambda: chromium.run("return document.getElementById('stop').disabled"))


def latency(chromium: Browser, clicks: int) -> list[float]:
    """Measure clicks, in milliseconds; each text is stopped before the next."""
    found = []
    for _ in range(clicks):
        found.append(chromium.wait(CLICK))
        chromium.click("#stop")
        generated(chromium)
    return found


def take_screenshots(chromium: Browser, folder: Path) -> None:
    """Take a picture of the page for each width, colour scheme and language, with a character chosen."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, size), dark, language in itertools.product(
        {"desktop": (1280, 900), "phone": PHONE}.items(), (False, True), ("en", "zh")
    ):
        chromium.emulate(*size, dark)
        chromium.run(f"document.querySelector('[data-language={language}]').click()")
        chromium.run("document.getElementById('generate').click()")
        generated(chromium)
        chromium.run("document.querySelectorAll('.text span')[60].click()")
        chromium.run("document.querySelector(arguments[0]).scrollIntoView()", "section" if name == "phone" else "body")
        chromium.picture(folder / f"{name}-{'dark' if dark else 'light'}-{language}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="one or two run folders or checkpoints")
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="take pictures instead")
    args = parser.parse_args()
    with page(args.runs) as address, browser() as chromium:
        chromium.go(address)
        chromium.run("document.getElementById('prompt').value = 'ROMEO:'")
        if args.screenshots:
            take_screenshots(chromium, args.screenshots)
            return
        latency(chromium, 2)
        times = latency(chromium, args.clicks)
    print(
        f"first character after the click, {args.clicks} clicks: median {statistics.median(times):.0f} ms, "
        f"{min(times):.0f} to {max(times):.0f} ms"
    )


if __name__ == "__main__":
    main()
