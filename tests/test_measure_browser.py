"""The report in a real browser: headless Chromium, at a phone's width, a desk's and on paper.

Chromium is driven over a pipe, in the DevTools protocol: JSON messages ended by a zero byte, requests on its descriptor 3, answers on 4.
"""

import base64
import json
import os
import shutil
import subprocess

import pytest

from rectilinear.measure import report

from .test_measure_report import made_up

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PHONE, DESK = 390, 1280


class Browser:
    """One page; `errors` and `requests` collect what its console says and what it tries to fetch."""

    def __init__(self, binary, profile):
        self.errors, self.requests, self.count = [], [], 0
        to_read, self.to = os.pipe()
        self.answers, answers_write = os.pipe()
        # bash gives the two pipes the descriptors that Chromium wants.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{answers_write}', binary, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command, pass_fds=(to_read, answers_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(to_read)
        os.close(answers_write)
        self.unread, self.session = b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self):
        while b"\0" not in self.unread:
            chunk = os.read(self.answers, 2**16)
            assert chunk, "Chromium ended"
            self.unread += chunk
        line, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        return message

    def show(self, path, width):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Page.navigate", url=path.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass
        self.ask("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 200))", awaitPromise=True)

    def evaluate(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.answers)


@pytest.fixture
def browser(tmp_path):
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert binary, "these tests need Chromium: apt-get install chromium (or deselect them: -m 'not browser')"
    opened = Browser(binary, tmp_path / "profile")
    yield opened
    opened.close()


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report.html(made_up()), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_renders_fetches_nothing_and_has_no_console_error(browser, page, width):
    browser.show(page, width)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()] or set(browser.requests) == {page.as_uri(), "data:,"}
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll in their own boxes
    assert browser.evaluate("[...document.querySelectorAll('figure')].every(f => f.getBoundingClientRect().width > 300)")
    # 12.5 units of text in a view box of 470: readable means at least 9 pixels.
    assert (
        browser.evaluate(
            "Math.min(...[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().width)) * 12.5 / 470"
        )
        > 9
    )
    assert browser.evaluate("[...document.querySelectorAll('figure > svg text')].every(t => t.getBBox().width > 0)")
    shot = base64.b64decode(browser.ask("Page.captureScreenshot")["data"])
    assert shot.startswith(b"\x89PNG")


def test_no_text_of_a_chart_is_cut_off(browser, page):
    browser.show(page, DESK)
    outside = """[...document.querySelectorAll('figure > svg')].flatMap(s => { const b = s.getBoundingClientRect();
        return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
            return r.left < b.left - 1 || r.right > b.right + 1 || r.top < b.top - 1 || r.bottom > b.bottom + 1 })
            .map(t => t.textContent) })"""
    assert browser.evaluate(outside) == []


def test_the_opening_is_in_sight_and_what_is_folded_unfolds_without_a_script(browser, page):
    browser.show(page, DESK)
    assert browser.evaluate("document.querySelector('figure').getBoundingClientRect().top") < 450
    hidden = "[...document.querySelectorAll('details table')].map(t => t.checkVisibility())"
    assert not any(browser.evaluate(hidden))
    browser.evaluate("document.querySelectorAll('summary').forEach(s => s.click()), true")
    assert all(browser.evaluate(hidden))
    assert browser.evaluate("document.scripts.length") == 0


def test_the_page_prints(browser, page):
    browser.show(page, DESK)
    assert base64.b64decode(browser.ask("Page.printToPDF")["data"]).startswith(b"%PDF")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    browser.ask("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)  # A4 less margins
    assert browser.evaluate("document.documentElement.scrollWidth") <= 718


def test_the_checks_above_can_fail(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<title>x</title><img src='http://127.0.0.1:9/x.png'><script>console.error('spoken'); nothing.here()</script>"
        "<div style='width:3000px'>w</div>"
    )
    browser.show(bad, DESK)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any("spoken" in error for error in browser.errors)
    assert any("Uncaught" in error for error in browser.errors)
    assert browser.evaluate("document.documentElement.scrollWidth") > DESK


def test_the_page_itself_forbids_requests(browser, page):
    page.write_text(
        page.read_text().replace("</body>", "<img src='http://127.0.0.1:9/x.png'><script src='http://127.0.0.1:9/x.js'></script></body>")
    )
    browser.show(page, DESK)
    refused = [error for error in browser.errors if "Content Security Policy" in error]
    assert {name for name in ("x.png", "x.js") for error in refused if name in error} == {"x.png", "x.js"}
