"""A real Chromium without a window, spoken to over its debugging pipe: no driver and no package is needed."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
)


def found() -> str | None:
    """The program, if this machine has one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One tab. `said`: what console and log got, and what scripts threw; `asked`: every address requested."""

    def __init__(self, down: int, up: int) -> None:
        self._down, self._up, self._rest, self._count = down, up, b"", 0
        self._session: str | None = None
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._up, 1 << 16)
            if not more:
                raise EOFError("the browser has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, inside = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(json.dumps(inside["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(inside["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(inside["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(inside["request"]["url"])
        return message

    def _call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def look(self, width: int, height: int, *, dark: bool = False, zoom: float = 1.0) -> None:
        """The size of the window, and which colours the reader prefers."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=zoom, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)

    def open(self, path: Path) -> None:
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The JSON value of an expression."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """The pointer goes there."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, *, whole: bool = True) -> bytes:
        """A PNG of the page, or of what the window shows of it."""
        clip = {}
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        taken = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        return base64.b64decode(taken["data"])


@contextmanager
def opened(program: str, profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own, which ends with the block."""
    (read_down, down), (up, write_up) = os.pipe(), os.pipe()
    line = f'exec "$0" "$@" 3<&{read_down} 4>&{write_up}'  # it reads commands from 3 and answers on 4
    words = ["bash", "-c", line, program, *FLAGS, f"--user-data-dir={profile}"]
    browser = subprocess.Popen(
        words, pass_fds=(read_down, write_up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(read_down)
    os.close(write_up)
    try:
        yield Page(down, up)
    finally:
        os.close(down)
        browser.terminate()
        browser.wait(timeout=20)
        os.close(up)
