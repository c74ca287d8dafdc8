"""The documentation as `make docs` has built it: every public name is on it, and it needs no network, no script and no wide screen."""

from __future__ import annotations

import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from .documents import ROOT
from .test_measure_browser import DESK, PHONE, browser  # noqa: F401

pytestmark = pytest.mark.docs
SITE = ROOT / "out" / "site"


@pytest.fixture(scope="module")
def pages() -> list[Path]:
    found = sorted(SITE.rglob("*.html"))
    assert found, "build the site first: make docs"
    return found


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import hooks

    return hooks


def test_every_public_name_is_in_the_reference(hooks, pages):
    inventory = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    modules = hooks.public_modules()
    assert {"rectilinear", "rectilinear.layers", "rectilinear.nn"} <= set(modules)
    anchors = {module: (SITE / "reference" / f"{module}.html").read_text(encoding="utf-8") for module in modules}
    names = [(module, f"{module}.{name}") for module in modules for name in hooks.public_names(module)]
    assert [name for _, name in names if name not in known] == []
    assert [name for module, name in names if f'id="{name}"' not in anchors[module]] == []


def test_the_list_of_public_names_is_what_the_modules_export(hooks):
    """The hooks read source, without importing what needs large libraries."""
    import rectilinear
    from rectilinear import layers, nn

    for module in (rectilinear, layers, nn):
        assert sorted(hooks.public_names(module.__name__)) == sorted(module.__all__)
    assert hooks.public_names("rectilinear.layers")[:2] == ["affine_forward", "affine_backward"]


class Addresses(HTMLParser):
    """What a page loads, and where it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def addresses(page: Path) -> Addresses:
    parser = Addresses()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(pages):
    found = {page: addresses(page) for page in pages}
    loaded = [(page.name, address) for page in pages for address in found[page].loads]
    assert [each for each in loaded if re.match(r"(https?:)?//", each[1])] == []
    dead = []
    for page in pages:
        for link in found[page].links:
            path, _, anchor = link.partition("#")
            if page.name == "404.html" or re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and target in found and anchor not in found[target].names):
                dead.append((str(page.relative_to(SITE)), link))
    assert dead == []
    assert sum(len(each.links) for each in found.values()) > 1000


def test_styles_load_nothing_from_elsewhere(pages):
    styles = "".join(path.read_text(encoding="utf-8") for path in SITE.rglob("*.css"))
    assert re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pages_fit_the_screen_fetch_nothing_and_have_no_console_error(browser, pages, width):  # noqa: F811
    wide = []
    for page in [page for page in pages if "source" not in page.parts and page.name != "404.html"]:
        browser.show(page, width)
        if browser.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(page.name)
    assert wide == []
    assert browser.errors == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.browser
def test_pages_can_be_read_without_scripts(browser, pages):  # noqa: F811
    browser.show(SITE / "404.html", PHONE)
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.ask("Page.navigate", url=(SITE / "index.html").as_uri())
    while browser.read().get("method") != "Page.loadEventFired":
        pass
    document = browser.ask("DOM.getDocument")["root"]["nodeId"]
    article = browser.ask("DOM.querySelector", nodeId=document, selector="article")["nodeId"]
    box = browser.ask("DOM.getBoxModel", nodeId=article)["model"]
    assert box["height"] > 1000
    assert box["width"] <= PHONE


@pytest.mark.browser
def test_the_search_finds_a_function_on_pages_opened_from_disk(browser, pages):  # noqa: F811
    browser.show(SITE / "index.html", DESK)
    # Typed until there is an answer: the page may not listen yet.
    found = """new Promise(done => { const query = document.querySelector('[data-md-component=search-query]'); query.focus();
        const look = () => { const links = [...document.querySelectorAll('.md-search-result__link')];
            if (links.length) return done(links.map(link => link.href));
            query.value = 'affine_relu_backward'; query.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true }));
            setTimeout(look, 300) }; look() })"""
    links = browser.ask("Runtime.evaluate", expression=found, awaitPromise=True, returnByValue=True)["result"]["value"]
    assert any("reference/rectilinear" in link for link in links)
