"""The report in a real browser: no errors, no network, every figure to be seen, fits a phone.

Skipped, with the reason, where there is no Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reproduce.browser import Browser, find, running
from reproduce.folders import everything

from spem.reproduce.report import build_report

BOXES = """
[...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const shape = svg.getBBox();
  const style = getComputedStyle(svg);
  return {
    label: svg.getAttribute("aria-label"),
    left: box.left, right: box.right, width: box.width, height: box.height,
    drawn: shape.width > 0 && shape.height > 0,
    visible: style.visibility === "visible" && style.display !== "none" && style.opacity === "1",
  };
})
"""
OVERFLOW = """
[...document.querySelectorAll("body *")].filter(
  e => !e.closest(".scroll, nav ul") && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.outerHTML.slice(0, 80))
"""
SIZES = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no chromium on this machine; Debian: apt-get install chromium")
    with running(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def report(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asks for the browser first, so that nothing is built where it is not there."""
    out = everything(tmp_path_factory.mktemp("results"))
    build_report(out)
    return out / "report.html"


def test_the_check_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A page with every fault that the tests below look for."""
    path = tmp_path / "bad.html"
    path.write_text(
        '<!doctype html><title>bad</title><svg aria-label="none" width="0" height="0"></svg>'
        '<svg aria-label="hidden" style="visibility:hidden"><path d="M0 0L9 9"/></svg>'
        '<div style="width:2000px">wide</div><img src="http://127.0.0.1:9/none.png">'
        "<script>console.error('an error'); missing()</script>"
    )
    browser.open(path.as_uri(), SIZES["phone"])
    said = " ".join(browser.said())
    assert "an error" in said
    assert "missing is not defined" in said
    assert "http://127.0.0.1:9/none.png" in browser.requests()
    assert browser.evaluate("document.documentElement.scrollWidth") >= 2000
    assert any("wide" in element for element in browser.evaluate(OVERFLOW))
    empty, hidden = browser.evaluate(BOXES)
    assert empty["width"] == 0
    assert not empty["drawn"]
    assert hidden["drawn"]
    assert not hidden["visible"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_the_browser(browser: Browser, report: Path, size: str, dark: bool) -> None:
    width = SIZES[size]
    browser.open(report.as_uri(), width, dark=dark)
    assert browser.said() == []
    assert [url.partition(":")[0] for url in browser.requests()] == ["file"]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOW) == []
    figures: list[dict[str, Any]] = browser.evaluate(BOXES)
    assert len(figures) == len(list((report.parent / "figures").glob("*.pdf"))) > 10
    for figure in figures:
        assert figure["visible"], figure
        assert figure["drawn"], figure
        assert figure["width"] >= min(300, width - 90), figure
        assert figure["height"] >= 100, figure
        assert figure["left"] >= 0, figure
        assert figure["right"] <= width, figure


def test_a_link_leads_to_its_run(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), SIZES["desktop"])
    browser.evaluate("document.querySelector('#table-table1-cifar10 td a').click()")
    target = browser.evaluate("document.querySelector(':target').innerText")
    assert "CIFAR-10*" in target
    top, below = browser.evaluate(
        "(() => { document.documentElement.style.scrollBehavior = 'auto';"
        "document.querySelector(':target').scrollIntoView();"
        "const box = document.querySelector(':target').getBoundingClientRect();"
        "const bar = document.querySelector('nav').getBoundingClientRect();"
        "return [box.top, bar.bottom]; })()"
    )
    assert top >= below - 1, "the run is hidden by the bar at the top"


def test_printed(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), SIZES["desktop"])
    pdf = browser.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF")
