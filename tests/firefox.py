"""Debian's Firefox, driven over WebDriver BiDi (https://www.w3.org/TR/webdriver-bidi/)."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import types

import aiohttp
import pytest
from clock import Limit

FIREFOX = os.environ.get("LIVEDIFFUSION_FIREFOX") or shutil.which("firefox-esr")
LISTENS = re.compile(r"WebDriver BiDi listening on (ws://\S+)")
PREFERENCES = {
    # a camera that is none, and opens without a question
    "media.navigator.streams.fake": True,
    "media.navigator.permission.disabled": True,
    "media.autoplay.default": 0,
    # no first run, no news, no look for updates: nothing outside this machine is asked for
    "app.update.enabled": False,
    "app.normandy.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
    "browser.safebrowsing.downloads.remote.enabled": False,
    "browser.sessionstore.resume_from_crash": False,
}


# where an element is; nothing while it moves, or something else lies over it
MIDDLE = """async (selector) => {
  const place = () => {
    const { x, y, width, height } =
      document.querySelector(selector)?.getBoundingClientRect() ?? { width: 0 }
    return width ? [Math.round(x + width / 2), Math.round(y + height / 2)] : null
  }
  const first = place()
  await new Promise((resolve) => setTimeout(resolve, 100))
  const then = place()
  if (!first || String(first) !== String(then)) return null
  return document.elementFromPoint(...then)?.closest(selector) ? then : null
}"""


class Failed(Exception):
    """A command was not done; the message is the browser's."""


class Firefox:
    """A browser with one tab, used as Playwright's pages are. Call `end` when done.

    Attributes:
        tab: its id.
        url: what was opened last.
    """

    def __init__(self, profile):
        lines = [f"user_pref({json.dumps(n)}, {json.dumps(v)});" for n, v in PREFERENCES.items()]
        profile.mkdir(parents=True, exist_ok=True)
        (profile / "user.js").write_text("\n".join(lines), encoding="utf-8")
        self.url, self._tell = "", []
        self._number, self._answers = 0, {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._log = (profile / "firefox.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [FIREFOX, "--headless", "--no-remote", "--profile", str(profile),
             "--remote-debugging-port", "0", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"},
            start_new_session=True,
        )  # fmt: skip
        try:
            self._do(self._connect(self._address()), 30)
            self.call("session.new", capabilities={})
            self.call("session.subscribe", events=["log.entryAdded"])
            self.tab = self.call("browsingContext.getTree")["contexts"][0]["context"]
        except BaseException:
            self.end()
            raise

    def _address(self):
        """Where it listens, as it says once it does."""
        limit = Limit(60)
        while not limit.over:
            assert self._process.poll() is None, "Firefox has ended"
            with open(self._log.name, encoding="utf-8", errors="replace") as log:
                if found := LISTENS.search(log.read()):
                    return found[1] + "/session"
            threading.Event().wait(0.1)
        raise AssertionError("Firefox does not listen")

    def _do(self, work, seconds):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    async def _connect(self, address):
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(address, max_msg_size=2**26)
        self._reader = self._loop.create_task(self._read())

    async def _read(self):
        async for message in self._socket:
            said = json.loads(message.data)
            if (answer := self._answers.pop(said.get("id"), None)) is not None:
                answer.set_result(said)
            elif said.get("method") == "log.entryAdded":
                self._hear(said["params"])
        for answer in self._answers.values():
            answer.cancel()

    def _hear(self, entry):
        frames = (entry.get("stackTrace") or {}).get("callFrames") or [{}]
        said = types.SimpleNamespace(
            type=entry["level"], text=entry.get("text") or "",
            location={"url": frames[0].get("url", "")},
        )  # fmt: skip
        for tell in self._tell:
            tell(said)

    async def _ask(self, method, params):
        self._number += 1
        answer = self._answers[self._number] = self._loop.create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        return await answer

    def call(self, method, seconds=60, **params):
        """The result of a command of BiDi's. Raises Failed."""
        said = self._do(self._ask(method, params), seconds)
        if said["type"] == "error":
            raise Failed(f"{method}: {said['error']}: {said['message']}")
        return said["result"]

    def preload(self, script):
        """Run it in each page before the page's own."""
        self.call("script.addPreloadScript", functionDeclaration=f"() => {{ {script} }}")

    def on(self, event, tell):
        """As Playwright's: what is said to the console."""
        if event == "console":
            self._tell.append(tell)

    def goto(self, url):
        self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")
        self.url = url

    def evaluate(self, function, *args):
        """What a function of the page's gives for these arguments, through JSON."""
        made = self.call(
            "script.callFunction",
            functionDeclaration=f"async (given) => JSON.stringify(await ({function})"
            "(...JSON.parse(given)) ?? null)",
            arguments=[{"type": "string", "value": json.dumps(args)}],
            target={"context": self.tab},
            awaitPromise=True,
        )
        if made["type"] == "exception":
            raise Failed(made["exceptionDetails"]["text"])
        return json.loads(made["result"]["value"])

    def wait_for_function(self, function, timeout):
        limit = Limit(timeout / 1000)
        while not self.evaluate(f"async () => !!(await ({function})())"):
            if limit.over:
                raise TimeoutError(function)
            threading.Event().wait(0.05)

    def click(self, selector):
        """With the mouse, in the middle of what is found first, once it stands still in sight."""
        limit = Limit(20)
        while (place := self.evaluate(MIDDLE, selector)) is None:
            assert not limit.over, f"{selector} cannot be clicked"
        x, y = place
        acts = [
            {"type": "pointerMove", "x": x, "y": y},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        mouse = {"type": "pointer", "id": "mouse", "actions": acts}
        self.call("input.performActions", context=self.tab, actions=[mouse])

    def end(self):
        """Every process of it is gone."""
        with contextlib.suppress(Exception):
            self._do(self._leave(), 10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._log.close()

    async def _leave(self):
        self._reader.cancel()
        await self._socket.close()
        await self._http.close()


@contextlib.contextmanager
def driving(profile):
    """Firefox; skips the test where it is not there."""
    if FIREFOX is None:
        pytest.skip("there is no Firefox here (LIVEDIFFUSION_FIREFOX)")
    running = Firefox(profile)
    try:
        yield running
    finally:
        running.end()
