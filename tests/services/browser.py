"""Chromium controlled by its DevTools protocol: sizes, color schemes, requests, errors, screenshots."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)

# A snap has a /tmp of its own.
needs_chromium = pytest.mark.skipif(
    "/snap/" in (shutil.which("chromium") or "/snap/"), reason="needs the Debian package chromium, not a snap"
)


class Page:
    """A tab. `complaints` are script errors, refused requests and warnings; `requests` are the requested URLs."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._waiting: list[dict[str, Any]] = []
        self._session = ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def show(self, page: Path, *, width: int, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        """Load `page` at this size, and wait until it is loaded."""
        self.complaints.clear()
        self.requests.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self._call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._call("Page.navigate", url=page.as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to this position, in pixels of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def save_picture(self, path: Path, *, whole: bool = True) -> None:
        """Save a screenshot of the whole page, or of the window."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def save_pdf(self, path: Path) -> None:
        """Print the page."""
        self._call("Emulation.setEmulatedMedia", media="print")
        answer = self._call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(answer["data"]))

    def width_on_paper(self, width: int = 720) -> int:
        """Return the width of the printed page where `width` pixels are available."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", media="print")
        return int(self.evaluate("document.documentElement.scrollWidth"))

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, object] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._waiting.append(answer)

    def _wait_for(self, event: str) -> None:
        while True:
            waiting, self._waiting = self._waiting, []
            if any(message.get("method") == event for message in waiting):
                return
            self._waiting.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            silence = max(0.0, deadline - time.monotonic())
            assert select.select([self._from], [], [], silence)[0], "Chromium is silent"
            content = os.read(self._from, 1 << 20)
            assert content, "Chromium has ended"
            self._buffer += content
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._record(message)
        return message

    def _record(self, message: Mapping[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(str(parameters["entry"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(parameters["args"]))


def picture_folder(default: Path) -> Path:
    """Return the folder for screenshots: that of DIST_TRAIN_PICTURES, or `default`."""
    folder = Path(os.environ.get("DIST_TRAIN_PICTURES", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def browser() -> Iterator[Page]:
    """Run Chromium with one tab for the block."""
    browser_reads, test_writes = os.pipe()
    test_reads, browser_writes = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = (*CHROMIUM_FLAGS, "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}")
        command = f'exec chromium "$@" 3<&{browser_reads} 4>&{browser_writes}'
        process = subprocess.Popen(
            ["bash", "-c", command, "chromium", *flags],
            pass_fds=(browser_reads, browser_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            yield Page(test_writes, test_reads)
        finally:
            os.close(test_writes)
            os.close(test_reads)
            process.terminate()
            process.wait(timeout=PATIENCE)
