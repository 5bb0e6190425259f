"""A headless Chromium that tests talk to over a pipe: DevTools protocol, no other package."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. complaints: what its console and its scripts have to complain of;
    requests: the addresses that it asked for."""

    def __init__(self, profile: Path):
        into, self.commands = os.pipe()
        self.replies, out = os.pipe()
        # the browser reads commands at descriptor 3 and replies at 4
        shell = f'exec "$0" "$@" 3<&{into} 4>&{out}'
        browser = [find_browser(), *FLAGS.split(), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, *browser, "--remote-debugging-pipe"],
            pass_fds=(into, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(into)
        os.close(out)
        self.buffer, self.count, self.session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.count:
                assert "error" not in reply, reply
                return reply["result"]

    def receive(self) -> dict:
        """The next message; notes what events say."""
        while b"\0" not in self.buffer:
            part = os.read(self.replies, 1 << 16)
            assert part, "the browser has gone"
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, path: Path) -> None:
        """Open a file; returns when it is loaded."""
        self.complaints, self.requests = [], []
        self.call("Page.navigate", url=path.as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page, of a promise when it is kept."""
        options = dict(returnByValue=True, awaitPromise=True)
        outcome = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in outcome, outcome
        return outcome["result"].get("value")

    def look(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """The size of the window, and light or dark."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.replies)
