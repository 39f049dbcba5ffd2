"""A browser to test pages in."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A page in headless Chromium, over the pipe of its DevTools protocol (file descriptors 3 and 4)."""

    def __init__(self, address: str, folder: str, offline: bool = True):
        into, self.write = os.pipe()
        self.read, out = os.pipe()
        code = f'exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir="$0" ' \
               f"--window-size=1300,1000 about:blank 3<&{into} 4>&{out}"
        self.process = subprocess.Popen(["bash", "-c", code, folder], pass_fds=(into, out), stderr=subprocess.DEVNULL)
        os.close(into)
        os.close(out)
        self.count, self.buffer, self.complaints, self.session = 0, b"", [], None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        if offline:
            self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
                      uploadThroughput=0)
        self.open(address)

    def open(self, address: str):
        self.call("Page.navigate", url="about:blank")  # an address that differs in its hash alone is no new page
        self.call("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({address.split('#')[0]!r}) && document.readyState === 'complete'")

    def look(self, width: int, height: int, scheme: str):
        """Become a phone or a desk, in the light or in the dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def key(self, name: str, text: str = ""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, text=text if kind == "keyDown" else "",
                      windowsVirtualKeyCode={"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowLeft": 37,
                                             "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}.get(name, 0))

    def call(self, method: str, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.read, 1 << 20)
                assert part, "the browser is gone"
                self.buffer += part
            answer, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            kind, parameters = answer["method"], answer["params"]
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded") or parameters.get("type") in ("error", "warning"):
                self.complaints.append(parameters)

    def evaluate(self, code: str):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str):
        for _ in range(200):
            if self.evaluate(condition):
                return
            time.sleep(0.1)
        raise AssertionError(f"never came true: {condition}")

    def click(self, selector: str):
        """With the mouse, in the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const e = {selector}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: str | None = None) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        if path:
            with open(path, "wb") as file:
                file.write(data)
        return data

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
