"""A headless Chromium, driven over its debugging pipe (two file descriptors; messages are JSON that ends in a null)."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60


class Page:
    """A page of the browser. `problems` collects console messages, exceptions, and violations of the page's policy."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self.problems: list[str] = []
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Return the JSON value of an expression, or of the promise that it is."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the window, and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """Press and release a key, such as "Tab" or "ArrowRight"."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}.get(key, 0)
            )

    def screenshot(self, file: Path, whole: bool = False) -> None:
        reply = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(reply["data"]))


class Browser:
    """A Chromium with a fresh profile; a context manager."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (child_in, self._out), (self._in, child_out) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{child_in} 4>&{child_out}', CHROMIUM, *options, "about:blank"],
            pass_fds=(child_in, child_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        self._numbers = count(1)
        self._waiting = b""
        self._events: list[dict[str, Any]] = []
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def page(self) -> Page:
        """Return a new page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for reply in self._messages():
            if reply.get("id") == number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return dict(reply["result"])
        raise AssertionError(f"the browser ended during {method}")

    def wait_for(self, event: str) -> None:
        """Wait for an event that has not been waited for."""
        if not any(message["method"] == event for message in self._events):
            next(message for message in self._messages() if message.get("method") == event)
        self._events.clear()

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._waiting:
                assert select.select([self._in], [], [], SECONDS)[0], f"no answer of the browser in {SECONDS} s"
                more = os.read(self._in, 1 << 20)
                if not more:
                    return
                self._waiting += more
            text, _, self._waiting = self._waiting.partition(b"\0")
            message = json.loads(text)
            if "method" in message:
                self._events.append(message)
                self._note(message)
            yield message

    def _note(self, message: dict[str, Any]) -> None:
        page, detail = self._pages.get(message.get("sessionId", "")), message["params"]
        if page is None:
            return
        if message["method"] == "Runtime.exceptionThrown":
            page.problems.append(str(detail["exceptionDetails"].get("exception", detail)))
        elif message["method"] == "Runtime.consoleAPICalled" and detail["type"] in ("error", "warning", "assert"):
            page.problems.append(str(detail["args"]))
        elif message["method"] == "Log.entryAdded":
            page.problems.append(detail["entry"]["text"])
        elif message["method"] == "Network.requestWillBeSent":
            url = detail["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                page.problems.append(f"request of {url}")
