"""A headless Chromium for the tests, spoken to by its DevTools protocol.

`Browser` is the process; `Browser.page()` gives a `Page` with what it asked for and complained of.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",  # it refuses to sandbox root, whom containers run tests as
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
]
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
_TEXT = {"Enter": "\r", " ": " "}


class Browser:
    def __init__(self, profile: Path):
        self._profile = profile
        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._endpoint = self._wait_for_endpoint()
        except BaseException:
            self.close()
            raise

    def _wait_for_endpoint(self):
        told = self._profile / "DevToolsActivePort"
        for _ in range(600):
            assert self._process.poll() is None, "Chromium did not start"
            lines = told.read_text().splitlines() if told.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise AssertionError("Chromium opened no DevTools port")

    def close(self):
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @contextlib.asynccontextmanager
    async def page(self):
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self._endpoint, max_msg_size=0) as socket,
        ):
            page = Page(socket)
            target = (await page.call("Target.createTarget", url="about:blank"))["targetId"]
            attached = await page.call("Target.attachToTarget", targetId=target, flatten=True)
            page.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            yield page
            await page.call("Target.closeTarget", targetId=target)


class Page:
    def __init__(self, socket):
        self._socket = socket
        self._numbers = itertools.count(1)
        self.session = None
        self.events = []

    async def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json(timeout=30)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self.events.append(answer)

    async def open(self, path):
        """Open a file and wait until it and what it shows at first are loaded."""
        self.events.clear()
        await self.call("Page.navigate", url=path.as_uri())
        await self.loaded()

    async def loaded(self):
        while not self.of("Page.loadEventFired"):
            self.events.append(await self._socket.receive_json(timeout=30))

    async def run(self, expression):
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def press(self, *keys):
        for key in keys:
            pressed = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
            await self.call(
                "Input.dispatchKeyEvent", type="keyDown", text=_TEXT.get(key, ""), **pressed
            )
            await self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    async def type(self, text):
        await self.call("Input.insertText", text=text)

    def of(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def requests(self):
        """The address of everything the page asked for."""
        return [sent["request"]["url"] for sent in self.of("Network.requestWillBeSent")]

    def complaints(self):
        """The entries of the console: uncaught errors, messages, and the browser's own entries."""
        return [
            *self.of("Runtime.exceptionThrown"),
            *self.of("Runtime.consoleAPICalled"),
            *self.of("Log.entryAdded"),
        ]
