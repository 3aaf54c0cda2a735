"""Logs in and consents by keyboard alone (argv: issuer, directory with a HOME whose
NSS database trusts the issuer). Prints what was seen as one JSON object."""

import http.server
import json
import pathlib
import sys
import threading
import urllib.parse

from webdriver import ENTER, TAB, Browser

issuer, home = sys.argv[1], pathlib.Path(sys.argv[2])
called = []

# What an assistive program would find out about a page.
SEEN = """
const text = id => document.getElementById(id)?.innerText ?? null;
const inputs = [...document.querySelectorAll('input:not([type=hidden])')];
return {
  title: document.title,
  lang: document.documentElement.lang,
  headings: [...document.querySelectorAll('h1')].map(h => h.innerText),
  mains: document.querySelectorAll('main').length,
  scripts: document.scripts.length,
  styled: document.styleSheets.length,
  inputs: inputs.map(i => ({
    name: i.name, type: i.type, autocomplete: i.autocomplete, value: i.value,
    label: [...i.labels].map(l => l.innerText).join(),
    invalid: i.getAttribute('aria-invalid'),
    described: i.getAttribute('aria-describedby') && text(i.getAttribute('aria-describedby')),
  })),
  buttons: [...document.querySelectorAll('button')].map(b => b.innerText),
  alert: document.querySelector('[role=alert]')?.innerText ?? null,
  focus: document.activeElement?.name ?? null,
  text: document.body.innerText,
};
"""
# 1280 pixels at 200 %, and the narrowest of WCAG 2.2 1.4.10.
WIDTHS = [640, 320]


class Callback(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/cb":
            query = urllib.parse.parse_qs(url.query)
            called.append({"query": query, "referer": self.headers.get("referer")})
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>arrived</title>arrived")

    def log_message(self, *_):
        pass


def look(browser):
    seen = browser.run(SEEN)
    seen["light"], seen["dark"] = browser.colours("light"), browser.colours("dark")
    overflow = "const all = document.documentElement; return all.scrollWidth - all.clientWidth"
    seen["overflow"] = []
    for width in WIDTHS:
        size = {"width": width, "height": 512, "deviceScaleFactor": 1, "mobile": False}
        browser.devtools("Emulation.setDeviceMetricsOverride", **size)
        seen["overflow"].append(browser.run(overflow))
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    return seen


def titled(browser, title):
    browser.until(title, lambda: browser.run("return document.title") == title)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Callback)
threading.Thread(target=server.serve_forever, daemon=True).start()
query = {
    "response_type": "code",
    "client_id": "web",
    "redirect_uri": f"http://127.0.0.1:{server.server_port}/cb",
    "scope": "openid profile orders:read",
    "state": "a state & more",
    "code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",
    "code_challenge_method": "S256",
}
start = f"{issuer}/authorize?{urllib.parse.urlencode(query)}"
seen = {}
with Browser(home) as browser:
    browser.go(start)
    seen["login"] = look(browser)
    browser.press("alice" + TAB + "not the password" + ENTER)
    titled(browser, "Error: Log in")
    seen["wrong"] = look(browser)
    browser.press("correct horse battery" + ENTER)
    titled(browser, "Allow access?")
    seen["cookies"] = browser.call("GET", "/cookie")
    seen["consent"] = look(browser)
    order = []
    for _ in range(10):
        browser.press(TAB)
        order.append(browser.run("return document.activeElement.innerText"))
        if order[-1] == "Allow":
            break
    seen["order"] = order
    browser.press(ENTER)
    titled(browser, "arrived")
    seen["called"] = list(called)
    # A client that needs no consent: from the form through here to the client at once.
    browser.go(start.replace("client_id=web", "client_id=trusted") + "&prompt=login")
    browser.press("alice" + TAB + "correct horse battery" + ENTER)
    titled(browser, "arrived")
    seen["trusted"] = called[1:]
    browser.go(f"{issuer}/logout")
    browser.press(TAB + ENTER)
    titled(browser, "Logged out")
    seen["after"] = browser.call("GET", "/cookie")
    seen["console"] = browser.console()
    # Were the console blind to violations, this would show it.
    browser.go(start + "&prompt=login")
    inline = "const s = document.createElement('script'); s.text = '1'; document.head.append(s)"
    browser.run(inline)
    seen["violations"] = browser.console()
    # No page of another site may hold ours in a frame.
    browser.go(f"http://127.0.0.1:{server.server_port}/frame")
    framed = "const f = document.createElement('iframe'); f.src = arguments[0]; document.body.append(f)"
    browser.run(framed, start)
    browser.until("the frame is refused", lambda: seen.setdefault("framed", []).extend(browser.console()) or seen["framed"])
json.dump(seen, sys.stdout)
