"""Looks at the page of the admin address, with a browser and a keyboard (argv: what to
do, URL, directory for a HOME, and more). Prints what was seen as one JSON object."""

import base64
import json
import os
import pathlib
import signal
import sys

from webdriver import ENTER, TAB, Browser

ESCAPE, UP, RIGHT, SHIFT = "\ue00c", "\ue013", "\ue014", "\ue008"
what, url, home = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
shots = os.environ.get("POSTERN_SCREENSHOTS")

ROWS = """
return [...document.querySelectorAll('#' + arguments[0] + ' > tr')].map(
  row => [...row.children].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()));
"""
SEEN = """
return {
  title: document.title,
  lang: document.documentElement.lang,
  headings: [...document.querySelectorAll('h1, h2, h3')].filter(h => h.checkVisibility()).map(h => h.tagName + ' ' + h.innerText.trim()),
  tiles: Object.fromEntries([...document.querySelectorAll('#tiles div')].map(d => [d.children[0].innerText, d.children[1].innerText])),
  ready: document.getElementById('ready').innerText.replace(/\s+/g, ' ').trim(),
  images: document.querySelectorAll('img').length,
  nodes: [...document.querySelectorAll('#drawing .node')].map(n => n.getAttribute('aria-label')),
  labels: [...document.querySelectorAll('#drawing .label text')].map(t => t.textContent),
  lines: [...document.querySelectorAll('#drawing path.line')].map(p => p.getAttribute('class').trim()),
  dashes: ['hbone', 'plaintext', 'probe', 'bypass'].map(k => getComputedStyle(document.querySelector('.legend .' + k)).strokeDasharray),
  alert: document.getElementById('trouble').hidden,
  fetched: performance.getEntriesByType('resource').map(e => new URL(e.name).origin),
  origin: location.origin,
};
"""
AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ['violations', 'incomplete']}).then(
  found => done({violations: found.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)]),
                 passes: found.passes.length}),
  error => done({violations: [['error', String(error)]], passes: 0}));
"""
FOCUS = "const a = document.activeElement; return a.id || a.dataset.id || a.getAttribute('aria-label') || a.innerText || a.tagName"


def rows(browser, body):
    return browser.run(ROWS, body)


def sized(browser, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.devtools("Emulation.setDeviceMetricsOverride", **size)


def scheme(browser, name):
    feature = {"name": "prefers-color-scheme", "value": name}
    browser.devtools("Emulation.setEmulatedMedia", features=[feature])


def shoot(browser, name, width, height, dark):
    if shots:
        sized(browser, width, height)
        scheme(browser, "dark" if dark else "light")
        browser.run("scrollTo(0, 0); document.activeElement.blur()")
        browser.call("POST", "/execute/async", {"script": "setTimeout(arguments[0], 700)", "args": []})
        image = base64.b64decode(browser.call("GET", "/screenshot"))
        (pathlib.Path(shots) / f"{name}.png").write_bytes(image)
        browser.devtools("Emulation.clearDeviceMetricsOverride")


def audit(browser, axe, script):
    """What axe-core says against it, in both colour schemes."""
    found = {}
    for name in ("light", "dark"):
        scheme(browser, name)
        browser.run(axe)
        found[name] = browser.call("POST", "/execute/async", {"script": script, "args": []})
    return found


def overflow(browser):
    text = "const all = document.documentElement; return all.scrollWidth - all.clientWidth"
    seen = []
    for width in (640, 320):
        sized(browser, width, 512)
        seen.append(browser.run(text))
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    return seen


def focused(browser):
    return browser.run(FOCUS)


def tab_to(browser, wanted, back=False):
    for _ in range(80):
        if focused(browser) == wanted:
            return
        if back:
            keys = [("keyDown", SHIFT), ("keyDown", TAB), ("keyUp", TAB), ("keyUp", SHIFT)]
            actions = [{"type": kind, "value": key} for kind, key in keys]
            keyboard = {"type": "key", "id": "keyboard", "actions": actions}
            browser.call("POST", "/actions", {"actions": [keyboard]})
        else:
            browser.press(TAB)
    raise SystemExit(f"TAB never comes to {wanted}; at {focused(browser)}")


def page(browser, axe, agent, expected):
    seen = {}
    sized(browser, 1440, 900)
    browser.go(url)
    edges = lambda: {(r[0], r[1], r[2]) for r in rows(browser, "edges")}
    wanted = {tuple(edge) for edge in expected}
    browser.until(f"the edges {wanted}", lambda: wanted <= edges())
    browser.until("certificates", lambda: rows(browser, "leaves"))
    browser.until("health", lambda: browser.run("return document.getElementById('tiles').children.length"))
    seen["page"] = browser.run(SEEN)
    for body in ("edges", "rows", "leaves", "workloads", "maps"):
        seen[body] = rows(browser, body)
    shoot(browser, "admin-light", 1440, 1330, False)
    shoot(browser, "admin-dark", 1440, 1330, True)
    shoot(browser, "admin-narrow", 320, 1200, False)
    seen["axe"] = audit(browser, axe, AXE)
    seen["overflow"] = overflow(browser)
    seen["colours"] = {name: browser.colours(name)["corner"] for name in ("light", "dark")}
    scheme(browser, "light")
    # By keyboard alone from here on: past the links, to the switch.
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    browser.press(TAB)
    seen["first"] = focused(browser)
    tab_to(browser, "theme")
    browser.press("D")
    browser.until("the dark theme", lambda: browser.run("return document.documentElement.dataset.theme") == "dark")
    seen["switched"] = browser.colours("light")["corner"]
    browser.press(UP + UP)
    browser.until("the system's", lambda: browser.run("return document.documentElement.dataset.theme") is None)
    # Into the drawing, along it, and one service alone.
    tab_to(browser, "drawing-region")
    browser.press(TAB)
    seen["entered"] = focused(browser)
    seen["outline"] = browser.run("return getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
    browser.press(RIGHT)
    seen["moved"] = focused(browser)
    browser.press(ENTER)
    browser.until("one service", lambda: browser.run("return !document.getElementById('deselect').hidden"))
    seen["said"] = browser.run("return document.getElementById('said').textContent")
    seen["touching"] = rows(browser, "edges")
    seen["kept"] = focused(browser)
    browser.press(ENTER)
    # Filters.
    seen["filtered"] = {}
    for field, text in (("f-who", "batch"), ("f-policy", "only-the"), ("f-process", "onerror"), ("f-namespace", "nowhere")):
        tab_to(browser, field, back=browser.run("return document.activeElement.type") == "reset")
        browser.press(text)
        before = browser.run("return document.getElementById('said').textContent")
        browser.until("an answer", lambda: browser.run("return document.getElementById('said').textContent") != before)
        seen["filtered"][field] = rows(browser, "rows")
        seen["none"] = browser.run("return document.getElementById('rows-empty').innerText")
        tab_to(browser, "Clear filters")
        browser.press(ENTER)
        browser.until("all again", lambda: len(rows(browser, "rows")) > len(seen["filtered"][field]))
    tab_to(browser, "f-verdict", back=True)
    browser.press("D")
    browser.until("denied alone", lambda: {r[2] for r in rows(browser, "rows")} == {"✕ Denied"})
    # Its details, and back to where it was.
    newest = browser.run("return document.querySelector('#rows button').getAttribute('aria-label')")
    tab_to(browser, newest)
    browser.press(ENTER)
    browser.until("a record", lambda: browser.run("return document.querySelectorAll('#record .fields dt').length"))
    seen["record"] = browser.run("return document.getElementById('record').innerText")
    seen["axe record"] = audit(browser, axe, AXE)
    browser.press(ESCAPE)
    browser.until("closed", lambda: not browser.run("return document.getElementById('record').open"))
    seen["back"] = focused(browser) == newest
    # Paused, nothing changes and nothing is asked.
    tab_to(browser, "pause", back=True)
    browser.press(ENTER)
    asked = "return performance.getEntriesByType('resource').length"
    browser.call("POST", "/execute/async", {"script": "setTimeout(arguments[0], 500)", "args": []})
    before = browser.run(asked)
    browser.call("POST", "/execute/async", {"script": "setTimeout(arguments[0], 3000)", "args": []})
    seen["paused"] = browser.run(asked) - before
    browser.press(ENTER)
    browser.until("it goes on", lambda: browser.run(asked) > before)
    seen["hostile"] = browser.run("return [document.querySelectorAll('main img, dialog img').length, window.hostile ?? null]")
    seen["fetched"] = browser.run("return [...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).origin))]")
    seen["origin"] = browser.run("return location.origin")
    seen["console"] = browser.console()
    os.kill(agent, signal.SIGKILL)
    browser.until("it says so", lambda: browser.run("return !document.getElementById('trouble').hidden"))
    seen["lost"] = browser.run("return document.getElementById('trouble').innerText")
    seen["still"] = len(rows(browser, "leaves"))
    return seen


def login(browser, axe, token):
    seen = {}
    browser.go(url)
    browser.until("the form", lambda: browser.run("return document.title") == "Log in – Postern")
    seen["at"] = browser.url()
    seen["focus"] = focused(browser)
    seen["axe"] = audit(browser, axe, AXE)
    seen["overflow"] = overflow(browser)
    browser.press("not the token" + ENTER)
    browser.until("an error", lambda: browser.run("return document.title").startswith("Error: "))
    seen["alert"] = browser.run("return document.querySelector('[role=alert]').innerText")
    seen["described"] = browser.run("return document.getElementById('token').getAttribute('aria-describedby')")
    browser.press(token + ENTER)
    browser.until("the page", lambda: browser.run("return document.getElementById('ready')?.innerText ?? ''").strip() != "")
    seen["cookies"] = browser.call("GET", "/cookie")
    seen["page"] = browser.run(SEEN)
    tab_to(browser, "logout")
    browser.press(ENTER)
    browser.until("the form", lambda: browser.run("return document.title") == "Log in – Postern")
    browser.go(url + "api/health")
    seen["after"] = browser.run("return document.body.innerText")
    seen["console"] = browser.console()
    return seen


def foreign(browser, other):
    """What a page of another site gets out of the admin address: nothing."""
    browser.go(other)
    script = """
    const done = arguments[arguments.length - 1], to = arguments[0];
    const tried = {};
    const read = fetch(to + 'api/health').then(a => a.text()).catch(e => e.name).then(t => tried.read = t);
    const set = fetch(to + 'log?level=trace', {method: 'POST', mode: 'no-cors'}).then(a => a.type).catch(e => e.name).then(t => tried.set = t);
    Promise.all([read, set]).then(() => done(tried));
    """
    return browser.call("POST", "/execute/async", {"script": script, "args": [url]})


with Browser(home) as browser:
    if what == "page":
        axe = pathlib.Path(sys.argv[4]).read_text()
        seen = page(browser, axe, int(sys.argv[5]), json.loads(sys.argv[6]))
    elif what == "login":
        seen = login(browser, pathlib.Path(sys.argv[4]).read_text(), sys.argv[5])
    else:
        seen = foreign(browser, sys.argv[4])
json.dump(seen, sys.stdout)
