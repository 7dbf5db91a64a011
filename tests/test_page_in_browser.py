"""`compare.html` in a headless Chromium, at desktop and phone width."""

import os
import shutil

import pytest

from cprec_recbole.compare.page import render_page
from tests.studies import failure, grid, made, study_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome here")
PICTURES = ("size", "latency", "popularity", "parts", "curves")
HOSTILE = "</script><script>window.hacked=1</script><b>bold</b><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser():
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of made-up studies, by what is in them."""
    full = grid(seeds=[1, 2]) + grid(seeds=[1, 2], model="GRU4Rec") + [failure(seed=1)]
    full += grid(["uncompressed", "tree", "new"], seeds=[1, 2], dataset="lastfm", length=20)
    about = {"options": {HOSTILE: HOSTILE}, "environment": {HOSTILE: HOSTILE}}
    hostile = [made(**about), made(HOSTILE, 4.0, parameters={HOSTILE: 5}, **about)]
    found, folder = {}, tmp_path_factory.mktemp("pages")
    for name, runs in (("full", full), ("hostile", hostile), ("one", [made(popularity={})])):
        found[name] = folder / f"{name}.html"
        found[name].write_text(render_page(study_of(folder / name, runs)), encoding="utf-8")
    return found


@pytest.fixture
def open_page(browser, pages):
    """Opens a page; at the end no script may have failed and nothing been fetched."""
    problems = []

    def start(name, width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        local = ("file:", "data:", "blob:")
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url.startswith(local) or problems.append(r.url))
        page.goto(pages[name].as_uri())
        return page

    yield start
    assert problems == []


def traces(page, picture):
    """What plotly holds for one picture."""
    plot = page.locator(f"[data-picture={picture}]")
    return plot.evaluate("plot => plot.data.map(({x, y, meta}) => ({x, y, meta}))")


def pick(page, **choices):
    for name, value in choices.items():
        page.select_option(f"[data-pick={name}]", value)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["full", "hostile", "one"])
def test_every_picture_is_drawn_and_nothing_is_wider_than_the_window(open_page, name, width):
    page = open_page(name, width)
    page.check("#all-rows")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """texts => texts.filter((text) => {
      const at = text.getBoundingClientRect();
      return at.left < 0 || at.right > innerWidth;
    }).map((text) => text.textContent)"""
    texts = page.locator(".plot text:not(.legendtext):visible")
    assert texts.evaluate_all(outside) == []
    marks = "[data-picture={}] :is(path.point, .point path, path.js-line)"
    missing = ["popularity"] if name == "one" else []
    assert [p for p in PICTURES if not page.locator(marks.format(p)).count()] == missing
    assert page.locator("figure p:visible").count() == len(missing)


def test_pickers_change_pictures_and_words(open_page):
    page = open_page("full")
    pick(page, dataset="ml-100k", model="SASRec", ratio="4")
    before = {picture: traces(page, picture) for picture in PICTURES}
    words = page.locator(".words:visible").inner_text()
    assert "SASRec on ml-100k" in words
    pick(page, ratio="8")
    changed = [picture for picture in PICTURES if traces(page, picture) != before[picture]]
    assert changed == ["popularity", "parts", "curves"]
    pick(page, model="GRU4Rec", size="parameters")
    assert all(traces(page, picture) != before[picture] for picture in PICTURES)
    assert page.locator("[data-picture=size] .xtitle").text_content() == "parameters"
    pick(page, dataset="lastfm")  # has no GRU4Rec, and another length
    assert page.locator("[data-pick=model] option").all_inner_texts() == ["SASRec"]
    assert {trace["meta"] for trace in traces(page, "latency")} == {"uncompressed", "tree", "new"}


def test_the_legend_hides_a_contender_everywhere(open_page):
    page = open_page("full")
    pick(page, dataset="ml-100k")

    def hidden(condition):
        """Waits until this holds of the `names` that each picture hides."""
        plots = "['size', 'latency', 'popularity', 'curves']"
        data = "document.querySelector(`[data-picture=${plot}]`).data"
        names = f"{data}.filter((t) => t.visible === 'legendonly').map((t) => t.meta)"
        page.wait_for_function(
            f"() => {plots}.every((plot) => {{ const names = {names}; return {condition}; }})"
        )

    item = page.locator("[data-picture=latency] .legendtoggle").nth(1)
    item.click()
    hidden("String(names) === 'compressed'")
    item.press("Enter")
    hidden("!names.length")
    item.dblclick()  # alone
    hidden("names.length > 5 && !names.includes('compressed')")
    item.dblclick()
    hidden("!names.length")


def test_the_table_shows_the_cell_and_sorts(open_page):
    page = open_page("full")
    rows = page.locator("#results tbody tr:visible")
    few = rows.count()
    page.check("#all-rows")
    assert rows.count() > few
    heading = page.locator("#results thead th", has_text="NDCG@20")
    numbers = "cells => cells.map((cell) => Number(cell.dataset.value))"
    for direction in ("ascending", "descending"):
        heading.locator("button").press("Enter")
        values = page.locator("#results tbody td:nth-child(6)").evaluate_all(numbers)
        assert values == sorted(values, reverse=direction == "descending")
        assert heading.get_attribute("aria-sort") == direction


def test_hostile_names_are_letters(open_page):
    page = open_page("hostile")
    page.locator("[data-picture=latency] .points path").last.hover(force=True)
    page.wait_for_selector("[data-picture=latency] .hovertext")
    assert "<script>" in page.locator("[data-picture=latency] .hovertext").text_content()
    assert page.locator("b", has_text="bold").count() == 0
    assert page.evaluate("window.hacked") is None


def test_the_ink_follows_the_colour_scheme(open_page):
    page = open_page("one", color_scheme="dark")
    star = page.locator("[data-picture=latency] .points path").first
    paper = page.locator("[data-picture=latency] .main-svg").first
    looks = {"dark": ("242, 245, 250", "17, 17, 17"), "light": ("27, 29, 32", "255, 255, 255")}
    for scheme, (ink, white) in looks.items():
        page.emulate_media(color_scheme=scheme)
        sync_api.expect(star).to_have_css("fill", f"rgb({ink})")
        sync_api.expect(page.locator("body")).to_have_css("color", f"rgb({ink})")
        for element in (page.locator("body"), paper):
            sync_api.expect(element).to_have_css("background-color", f"rgb({white})")


def test_the_tables_need_no_script(open_page):
    page = open_page("full", java_script_enabled=False)
    assert page.locator("#results tbody tr:visible").count() > 50
    assert page.locator(".words:visible").count() == 3
