"""The page in headless Chromium: quiet, quick, readable at every width and by every means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import Params
from pipeline.report import write_report
from tests.report.browser import Browser, Page
from tests.report.made_up import SECTIONS, made_up_runs

# Texts whose contrast with what lies behind them is below WCAG 2.2's AA: 4.5, or 3 for large ones
# and for signs.
_FAINT = """
(() => {
  const parse = (text) => {
    const n = text.match(/[\\d.]+(?:e-?\\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...n.slice(0, 3).map((v) => v * scale), n[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const luminance = (c) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const above = element.parentElement ? behind(element.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), above);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("style")) continue;
    const style = getComputedStyle(element);
    const svg = element.closest("svg");
    const ground = behind(element);
    const ink = over(parse(svg ? style.fill : style.color), ground);
    const [a, b] = [luminance(ink), luminance(ground)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 || element.matches(".mark");
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push([text, ratio]);
  }
  return faint;
})()
"""


@pytest.fixture(scope="module")
def file(finished_run: Params) -> Path:
    return write_report(finished_run, made_up_runs())


@contextmanager
def opened(browser: Browser, file: Path, **settings: Any) -> Iterator[Page]:
    page = browser.open(**settings)
    try:
        yield page.load(file)
    finally:
        page.close()


def shown_cards(page: Page) -> list[str]:
    """Ids of the cards that are to be seen, the topmost last."""
    script = (
        "[...document.querySelectorAll('.card')].filter(c => c.checkVisibility())"
        ".sort((a, b) => (+getComputedStyle(a).zIndex || 0) - (+getComputedStyle(b).zIndex || 0))"
        ".map(c => c.id)"
    )
    cards: list[str] = page.evaluate(script)
    return cards


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_quiet_and_readable(browser: Browser, file: Path, width: int, dark: bool) -> None:
    with opened(browser, file, width=width, dark=dark) as page:
        assert page.complaints() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [file.as_uri()]
        assert page.evaluate(
            "[innerWidth, document.documentElement.scrollWidth <= innerWidth]"
        ) == [
            width,
            True,
        ]
        assert page.evaluate(_FAINT) == []
        ids = "[...document.querySelectorAll('main > section')].map(s => s.id)"
        assert page.evaluate(ids) == [*SECTIONS[:-1], "sweep", "provenance"]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(23, 22, 20)") is dark
        assert page.evaluate("window.hacked === undefined")


def test_tables_fit_a_desktop(browser: Browser, file: Path) -> None:
    """No table needs its scroll bar, which few readers would see."""
    with opened(browser, file, width=1280) as page:
        tables = "[...document.querySelectorAll('.scroll')].filter(t => t.checkVisibility())"
        wide = f"{tables}.filter(t => t.scrollWidth > t.clientWidth).map(t => t.innerText)"
        assert page.evaluate(f"{tables}.length") > 3
        assert page.evaluate(wide) == []


def test_the_check_of_contrast_sees_faint_text(browser: Browser, file: Path) -> None:
    with opened(browser, file) as page:
        page.evaluate("document.querySelector('h1').style.color = '#ddd'")
        assert page.evaluate(_FAINT) != []


def test_the_console_is_heard(browser: Browser, file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(file.read_text().replace('"use strict";', '"use strict"; absent();'))
    with opened(browser, broken) as page:
        assert page.complaints() != []  # the policy lets no other script run


def test_it_opens_within_a_second(browser: Browser, file: Path) -> None:
    """By the page's own clock; the best of some, since other work may share the machine."""
    script = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    times = []
    for _ in range(5):
        with opened(browser, file) as page:
            times.append(page.evaluate(script))
    assert 0.0 < min(times) < 1000.0
    assert file.stat().st_size < 1_500_000


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_token_shows_what_models_said(browser: Browser, file: Path, scripts: bool) -> None:
    with opened(browser, file, scripts=scripts) as page:
        default = shown_cards(page)
        assert len(default) == 1
        page.point_at("[aria-describedby=card-7]")
        assert shown_cards(page)[-1] == "card-7"
        text = page.evaluate("document.getElementById('card-7').innerText")
        for said in ("teacher", "student", "KL 0.300", "40.0%", "✓ word7·", "baseline", "↵"):
            assert said in text, said
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert shown_cards(page) == default
        page.click("[aria-describedby=card-9]")
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert shown_cards(page)[-1] == "card-9"  # it keeps the focus
        page.press(*(("ArrowRight", 39) if scripts else ("Tab", 9)))
        assert shown_cards(page)[-1] == "card-10"


def test_a_tap_shows_it_on_a_phone(browser: Browser, file: Path) -> None:
    with opened(browser, file, width=390) as page:
        page.tap("[aria-describedby=card-5]")
        page.evaluate("new Promise(done => setTimeout(done, 400))")
        assert shown_cards(page)[-1] == "card-5"
        box = page.evaluate(
            "(() => { const r = document.getElementById('card-5').getBoundingClientRect();"
            "return [r.left >= 0, r.right <= innerWidth, r.height > 100]; })()"
        )
        assert box == [True, True, True]


def test_cards_hold_all_they_say(browser: Browser, file: Path) -> None:
    """No line of a card is cut off below, at either width."""
    for width in (390, 1280):
        with opened(browser, file, width=width) as page:
            cut = page.evaluate(
                "[...document.querySelectorAll('.card')].filter(c => { c.style.display = 'grid';"
                "const cut = c.scrollHeight > c.clientHeight + 1; c.style.display = ''; return cut;"
                "}).length"
            )
            assert cut == 0


def test_colours_follow_the_model_chosen(browser: Browser, file: Path) -> None:
    colour = "getComputedStyle(document.querySelector('[aria-describedby=card-1]')).backgroundColor"
    with opened(browser, file, scripts=False) as page:
        assert page.evaluate(colour) == "rgba(0, 0, 0, 0)"  # KL 0.05 of the student
        page.click("label[for=by-1]")
        assert page.evaluate(colour) == "rgb(235, 160, 178)"  # 1.5 of the baseline


def test_sweep_is_sorted_by_a_click(browser: Browser, file: Path) -> None:
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[2].innerText)"
    with opened(browser, file) as page:
        assert page.evaluate(column) == ["3.2500", "3.5000", "10.0000"]
        page.click(".sortable th:nth-child(3) button")
        page.click(".sortable th:nth-child(3) button")
        assert page.evaluate(column) == ["10.0000", "3.5000", "3.2500"]
        state = "document.querySelector('.sortable th:nth-child(3)').ariaSort"
        assert page.evaluate(state) == "descending"


def test_paper_is_light_and_holds_no_cards(browser: Browser, file: Path) -> None:
    with opened(browser, file, width=700, media="print", dark=True) as page:  # A4's, less margins
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert shown_cards(page) == []
        assert page.evaluate(_FAINT) == []
        assert page.evaluate("document.querySelector('nav').checkVisibility()") is False
        pdf = page.call("Page.printToPDF", printBackground=True)["data"]
        assert len(pdf) > 50_000
