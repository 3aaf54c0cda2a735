"""A browser by the WebDriver protocol (W3C), with nothing but the standard library."""

import base64
import json
import re
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
TAB, ENTER = "\ue004", "\ue007"


class Browser:
    """Chromium. `home` is where it keeps all, with the certificates that it trusts."""

    def __init__(self, home):
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                self.base = f"http://127.0.0.1:{found[1]}/session"
                break
        else:
            raise SystemExit("chromedriver does not start")
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                f"--user-data-dir={home}/profile",
            ],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            made = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.terminate()
            raise
        self.base += f"/{made['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(10)

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:2000]}") from None

    def go(self, url):
        """Opens a page; again where the network has just changed, as it does when a pod comes."""
        end = time.monotonic() + 20
        while True:
            self.call("POST", "/url", {"url": url})
            shown = self.run("return document.body?.innerText ?? ''")
            if "ERR_NETWORK_CHANGED" not in shown or time.monotonic() > end:
                return
            time.sleep(0.5)

    def url(self):
        return self.call("GET", "/url")

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command, **parameters):
        body = {"cmd": command, "params": parameters}
        return self.call("POST", "/goog/cdp/execute", body)

    def press(self, keys):
        """Types at whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", "/actions", {"actions": [keyboard]})

    def until(self, what, check):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if value := check():
                    return value
            except RuntimeError:
                pass  # Between two pages.
            time.sleep(0.05)
        raise SystemExit(f"never so: {what}; at {self.url()}: {self.run('return document.body.innerText')}")

    def console(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def colours(self, scheme):
        """How the page looks in `light` or `dark`: its corner, and how many colours it has."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        image = pixels(base64.b64decode(self.call("GET", "/screenshot")))
        return {"corner": "#%02x%02x%02x" % image[0], "count": len(set(image))}


def pixels(png):
    """All pixels of an 8-bit PNG without interlacing (PNG 9.2), as (red, green, blue)."""
    at, data = 8, b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            data += body
        at += 12 + length
    assert (depth, interlaced) == (8, 0) and colour in (2, 6)
    size = {2: 3, 6: 4}[colour]
    raw, before, found = zlib.decompress(data), bytearray(width * size), []
    for y in range(height):
        start = y * (width * size + 1)
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + width * size])
        for x in range(len(line)):
            left = line[x - size] if x >= size else 0
            corner = before[x - size] if x >= size else 0
            line[x] = (line[x] + predicted(method, left, before[x], corner)) & 255
        before = line
        found += [tuple(line[x : x + 3]) for x in range(0, len(line), size)]
    return found


def predicted(method, left, above, corner):
    if method == 4:
        guess = left + above - corner
        return min((left, above, corner), key=lambda value: abs(guess - value))
    return (0, left, above, (left + above) // 2)[method]
