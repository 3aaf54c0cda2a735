"""Logs in at a web application in Chromium, by keyboard, and prints what it shows.

browser.py HOME URL USER PASSWORD TRACEPARENT
"""

import json
import sys

from webdriver import ENTER, TAB, Browser

home, url, user, password, trace = sys.argv[1:]


def titled(browser, title):
    browser.until(title, lambda: browser.run("return document.title") == title)


with Browser(home) as browser:
    # As a tracing extension, or the application's own gateway, would begin a trace.
    browser.devtools("Network.enable")
    browser.devtools("Network.setExtraHTTPHeaders", headers={"traceparent": trace})
    browser.go(url)
    titled(browser, "Log in")
    browser.press(user + TAB + password + ENTER)
    titled(browser, "Allow access?")
    shown = browser.run("return document.body.innerText")
    for _ in range(10):
        browser.press(TAB)
        if browser.run("return document.activeElement.innerText") == "Allow":
            break
    browser.press(ENTER)
    browser.until("the answer", lambda: "/callback" in browser.run("return location.pathname"))
    browser.until("its text", lambda: browser.run("return document.body.innerText").startswith("{"))
    said = json.loads(browser.run("return document.body.innerText"))
json.dump({"consent": shown, **said}, sys.stdout)
