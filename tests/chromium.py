"""Headless Chromium over the DevTools protocol by a pipe: keys as a person presses them, and what the console says."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CODES = {
    "Enter": 13, "Escape": 27, "Tab": 9, "Backspace": 8, "Delete": 46, " ": 32,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
SHIFT = 8


class Browser:
    """A page of its own in a browser of its own; skips the test where there is no Chromium."""

    def __init__(self, profile: Path) -> None:
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next((path for name in names if (path := shutil.which(name))), "")
        if not program:
            pytest.skip("there is no Chromium on this machine")
        own_read, child_write = os.pipe()
        child_read, own_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        # Nothing outside this machine can be reached.
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"]
        # The pipe is at the file numbers 3 and 4, which a shell gives.
        line = f"exec {shlex.join([program, *flags, 'about:blank'])} 3<&{child_read} 4>&{child_write}"
        self.process = subprocess.Popen(
            ["bash", "-c", line],
            pass_fds=(child_read, child_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_read)
        os.close(child_write)
        self._to, self._from = os.fdopen(own_write, "wb", 0), os.fdopen(own_read, "rb", 0)
        self._rest, self._number, self._session = b"", 0, ""
        self.console: list[str] = []
        """What the page wrote to its console, and errors that it did not catch."""
        self.requests: list[str] = []
        """Every address that the page asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._from.fileno(), 1 << 16)
            if not chunk:
                raise ConnectionError("the browser has ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(arg.get("value", arg)) for arg in parameters["args"]))
        elif message.get("method") == "Runtime.exceptionThrown":
            self.console.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return message

    def open(self, address: str) -> None:
        """Go to an address, and wait until its page is there."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not in {seconds} s: {condition}; the console says {self.console}"
            time.sleep(0.01)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        code = CODES.get(key) or ord(key.upper())
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Type letters."""
        for letter in text:
            self.press(letter)

    def click(self, element: str) -> None:
        """Press the mouse on the middle of an element, which a JavaScript expression gives."""
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def look(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """A window's size in pixels, and the colours that its user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, file: Path) -> None:
        """A picture of the window."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def kill(self) -> None:
        """End the browser at once."""
        self.process.kill()
        self.process.wait()
        self._to.close()
        self._from.close()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def axe_script() -> str:
    """The script of axe-core, which the environment variable TEXTRL_GYM_AXE names (axe.min.js)."""
    file = os.environ.get("TEXTRL_GYM_AXE")
    if not file:
        pytest.skip("TEXTRL_GYM_AXE does not name axe-core's axe.min.js; make docs-test fetches it")
    return Path(file).read_text(encoding="utf-8")


def violations(browser: Browser, script: str, where: str) -> list[str]:
    """What axe-core finds, by its rules of WCAG 2.2 AA and best practices."""
    browser.run(f"{script}; 0")
    found = browser.run(
        "axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html).slice(0, 3)]))"
    )
    return [f"{where}: {one}" for one in found]
