"""Headless Chromium over the DevTools protocol's pipe: messages of JSON, each ended by a zero byte.

https://chromedevtools.github.io/devtools-protocol/ has the commands and events used here.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 60.0  # seconds, for a busy machine
# Chromium reads commands from descriptor 3 and writes answers and events to 4.
_START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """A running Chromium; `open` gives pages."""

    def __init__(self, binary: str, profile: Path) -> None:
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        options += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--disable-extensions", "--disable-background-networking"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        (his_in, self._out), (self._in, his_out) = _pipe(), _pipe()
        ends = (his_in, his_out)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, ends), binary, *options, "about:blank"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, **settings: Any) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        return Page(self, target, attached["sessionId"], **settings)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda message: message.get("id") == self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer.get("result", {})

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next message that is wanted; those before it are kept as events."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            while b"\0" not in self._rest:
                left = deadline - time.monotonic()
                ready = left > 0 and select.select([self._in], [], [], left)[0]
                assert ready, "Chromium does not answer"
                data = os.read(self._in, 2**20)
                assert data, "Chromium has ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            message: dict[str, Any] = json.loads(line)
            if wanted(message):
                return message
            self.events.append(message)


class Page:
    """A tab. `complaints` and `requests` are what the console and the network saw of it."""

    def __init__(
        self,
        browser: Browser,
        target: str,
        session: str,
        *,
        width: int = 1280,
        dark: bool = False,
        media: str = "screen",
        scripts: bool = True,
    ) -> None:
        self._browser = browser
        self._target = target
        self._session = session
        self.width = width
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def load(self, file: Path) -> Self:
        """Navigate, and wait until everything is there."""
        self._browser.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        seen = [e for e in self._browser.events if e.get("method") == "Page.loadEventFired"]
        if not seen:
            self._browser.events.append(
                self._browser.wait(lambda m: m.get("method") == "Page.loadEventFired")
            )
        return self

    def evaluate(self, script: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        mine = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [event["params"] for event in mine if event.get("method") in methods]

    def complaints(self) -> list[dict[str, Any]]:
        self.evaluate("new Promise(done => setTimeout(done, 50))")
        return self._events("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

    def requests(self) -> list[str]:
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def centre(self, selector: str) -> tuple[float, float]:
        """Where an element's first line is, once scrolled into sight."""
        return tuple(  # type: ignore[return-value]
            self.evaluate(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                "e.scrollIntoView({block: 'center', behavior: 'instant'});"
                "const r = e.getClientRects()[0];"
                "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
            )
        )

    def point_at(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        self._press_and_release("Input.dispatchMouseEvent", self.centre(selector))

    def tap(self, selector: str) -> None:
        x, y = self.centre(selector)
        self._press_and_release("Input.emulateTouchFromMouseEvent", (int(x), int(y)))

    def _press_and_release(self, method: str, place: tuple[float, float]) -> None:
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call(method, type=kind, **at)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            names = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **names)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


def _pipe() -> tuple[int, int]:
    """The ends of a pipe, above the numbers that Chromium takes."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
