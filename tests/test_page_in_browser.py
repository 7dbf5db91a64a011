"""`compare.html` in a headless Chromium, at desktop and phone width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cprec_recbole.compare.page import write_page
from tests.studies import failure, grid, record, write_study

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is here")

WIDTHS = {"desktop": (1440, 900), "phone": (390, 844)}
PICTURES = ("size", "latency", "popularity", "parts", "curves")
HOSTILE = "</script><script>window.hacked=1</script><b>bold</b><img src=x onerror=window.hacked=1>"

# every visible text and mark of the plots that leaves the plot's own box or the window
CUT_OFF = """() => [...document.querySelectorAll('.plot:not([hidden])')].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('.main-svg text, .main-svg .legendpoints')].filter((text) => {
    const at = text.getBoundingClientRect();
    return at.width > 0 && (at.left < box.left - 1 || at.right > box.right + 1
      || at.top < box.top - 1 || at.bottom > box.bottom + 1 || at.right > innerWidth);
  }).map((text) => `${plot.dataset.picture}: ${text.textContent}`);
})"""
# tick labels of one axis that lie on each other
ON_EACH_OTHER = """() => [...document.querySelectorAll('.plot:not([hidden])')].flatMap((plot) =>
  ['.xaxislayer-above', '.yaxislayer-above'].flatMap((axis) => {
    const boxes = [...plot.querySelectorAll(`${axis} text`)].map((t) => t.getBoundingClientRect());
    return boxes.slice(1).filter((b, i) => {
      const a = boxes[i];
      return a.right > b.left + 1 && b.right > a.left + 1
        && a.bottom > b.top + 3 && b.bottom > a.top + 3;
    }).map(() => `${plot.dataset.picture} ${axis}`);
  }))"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of made-up studies, by what is in them."""
    full = grid(["ml-100k"], ["SASRec", "GRU4Rec"], seeds=[1, 2])
    full += grid(["amazon-beauty"], ["SASRec"], ["uncompressed", "tree", "new"], seeds=[1, 2])
    hostile = [
        record(HOSTILE, "SASRec", name, ratio, command=HOSTILE, options={HOSTILE: HOSTILE})
        for name, ratio in (("uncompressed", None), (HOSTILE, 4.0))
    ]
    studies = {
        "full": [*full, failure()],
        "hostile": [*hostile, failure(contender=HOSTILE, error=HOSTILE)],
        "one run": [record(popularity=None)],
        "all failed": [failure()],
        "lengths": [record(length=length) for length in (10, 20, 50, 100)],
    }
    found = {}
    for name, records in studies.items():
        folder = tmp_path_factory.mktemp("page")
        write_page(write_study(folder / "study", records), folder / "compare.html")
        found[name] = folder / "compare.html"
    return found


def watched(browser: Any, path: Path, width: str, scheme: str) -> tuple[Any, list[str]]:
    """A page, and what its scripts complain of or fetch."""
    wide, high = WIDTHS[width]
    problems: list[str] = []
    page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    local = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(local) else problems.append(r.url))
    page.goto(path.as_uri())
    return page, problems


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Opens a page; at the end no script may have failed and nothing been fetched."""
    opened = []

    def start(name: str, width: str = "desktop", scheme: str = "light") -> Any:
        opened.append(watched(browser, pages[name], width, scheme))
        return opened[-1][0]

    yield start
    for page, problems in opened:
        page.close()
        assert problems == []


@pytest.fixture(scope="module")
def shared(browser: Any, pages: dict[str, Path]) -> tuple[Any, list[str]]:
    return watched(browser, pages["full"], "desktop", "light")


@pytest.fixture
def full(shared: tuple[Any, list[str]]) -> Iterator[Any]:
    """The page of a whole study at SASRec on ml-100k, ratio 4; one page for all tests."""
    page, problems = shared
    choices = {"dataset": "ml-100k", "model": "SASRec", "ratio": "4", "size": "parameters"}
    for name, value in choices.items():
        page.select_option(f"[data-pick={name}]", value)
    page.uncheck("#all-rows")
    yield page
    assert problems == []


def traces(page: Any, picture: str) -> list[dict[str, Any]]:
    """What plotly holds for one picture."""
    found: list[dict[str, Any]] = page.evaluate(
        "name => document.querySelector(`[data-picture=${name}]`).data"
        ".map(({x, y, meta, visible, name}) => ({x, y, meta, visible, name}))",
        picture,
    )
    return found


def marks(page: Any, picture: str) -> int:
    """How many marks and lines one picture shows."""
    paths = "path.point, .point path, path.js-line, text.textpoint"
    return int(page.locator(f"[data-picture={picture}] .main-svg").locator(paths).count())


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("full", "desktop", "dark"),
        ("full", "phone", "light"),
        ("hostile", "desktop", "light"),
        ("hostile", "phone", "dark"),
        ("one run", "desktop", "light"),
        ("one run", "phone", "light"),
    ],
)
def test_nothing_is_cut_off_and_every_picture_is_drawn(open_page, name, width, scheme):
    page = open_page(name, width, scheme)
    page.check("#all-rows")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for size in ("bytes", "parameters"):
        page.select_option("[data-pick=size]", size)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate(ON_EACH_OTHER) == []
    missing = ["popularity"] if name == "one run" else []
    assert [picture for picture in PICTURES if not marks(page, picture)] == missing
    assert page.locator(".none:visible").count() == len(missing)
    if width == "phone":  # the table is wider than the phone, and scrolls
        table = page.locator(".scroll").last
        assert table.evaluate("box => box.scrollWidth - box.clientWidth") > 0
        assert table.evaluate("box => getComputedStyle(box).overflowX") == "auto"


def test_pickers_change_every_picture(full):
    page = full
    before = {picture: traces(page, picture) for picture in PICTURES}
    words = page.inner_text(".cell-words")
    page.select_option("[data-pick=model]", "GRU4Rec")
    assert [p for p in PICTURES if traces(page, p) == before[p]] == []
    assert page.inner_text(".cell-words") != words
    page.select_option("[data-pick=model]", "SASRec")
    assert {picture: traces(page, picture) for picture in PICTURES} == before


def test_the_ratio_changes_the_pictures_of_one_ratio(full):
    page = full
    before = {picture: traces(page, picture) for picture in PICTURES}
    page.select_option("[data-pick=ratio]", "8")
    changed = [picture for picture in PICTURES if traces(page, picture) != before[picture]]
    assert changed == ["popularity", "parts", "curves"]


def test_the_size_picker_changes_the_axis(full):
    page = full
    title = page.locator("[data-picture=size] .xtitle")
    assert title.text_content() == "parameters"
    page.select_option("[data-pick=size]", "bytes")
    assert title.text_content() == "size of the weights"


def test_models_are_those_that_the_data_set_has(full):
    page = full
    page.select_option("[data-pick=model]", "GRU4Rec")
    page.select_option("[data-pick=dataset]", "amazon-beauty")  # has no GRU4Rec
    assert page.locator("[data-pick=model] option").all_inner_texts() == ["SASRec"]
    shown = {trace["meta"] for trace in traces(page, "latency")}
    assert shown == {"uncompressed", "tree", "new"}


def test_lengths_have_a_picker_where_there_are_several(open_page, full):
    assert full.locator("[data-pick=length]").is_hidden()
    page = open_page("lengths")
    options = page.locator("[data-pick=length] option").all_inner_texts()
    assert options == ["10", "20", "50", "100"]
    page.select_option("[data-pick=length]", "100")
    assert "length 100" in page.inner_text(".cell-words")


def test_the_legend_hides_a_contender_everywhere(full):
    page = full

    def hidden() -> dict[str, set[str]]:
        drawn = ("size", "latency", "popularity", "curves")
        return {
            p: {t["meta"] for t in traces(page, p) if t["visible"] is False and "meta" in t}
            for p in drawn
        }

    button = page.locator(".legend button[data-contender=narrower]")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert all(names == {"narrower"} for names in hidden().values())
    button.click()
    assert all(names == set() for names in hidden().values())
    page.click("#toggle-all")
    assert all("compressed" in names for names in hidden().values())
    page.click("#toggle-all")
    assert all(names == set() for names in hidden().values())


def test_contenders_that_a_data_set_lacks_are_greyed_out(full):
    page = full
    page.select_option("[data-pick=dataset]", "amazon-beauty")
    assert page.locator(".legend button[data-contender=int8]").is_disabled()
    assert page.locator(".legend button[data-contender=tree]").is_enabled()


def test_the_table_shows_the_cell_and_sorts(full):
    page = full
    rows = page.locator("#results tbody tr:visible")
    few = rows.count()
    page.check("#all-rows")
    assert rows.count() > few
    heading = page.locator("#results thead th", has_text="NDCG@20")
    column = heading.evaluate("th => th.cellIndex")

    def values() -> list[float]:
        found: list[float] = page.evaluate(
            "i => [...document.querySelector('#results tbody').rows]"
            ".map((row) => Number(row.cells[i].dataset.value))",
            column,
        )
        return found

    heading.locator("button").click()
    assert values() == sorted(values())
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    assert values() == sorted(values(), reverse=True)


def test_hostile_names_are_letters(open_page):
    page = open_page("hostile")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".legend button").nth(1).inner_text() == HOSTILE
    assert page.locator("b", has_text="bold").count() == 0
    point = page.locator("[data-picture=latency] .points path").last
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("[data-picture=latency] .hovertext", timeout=10_000)
    assert HOSTILE in page.locator("[data-picture=latency] .hovertext").text_content()
    assert page.evaluate("window.hacked") is None


def test_the_ink_follows_the_colour_scheme(open_page):
    page = open_page("one run", scheme="dark")
    star = page.locator("[data-picture=latency] .points path").first
    sync_api.expect(star).to_have_css("fill", "rgb(232, 234, 237)")
    page.emulate_media(color_scheme="light")
    sync_api.expect(star).to_have_css("fill", "rgb(27, 29, 32)")


def test_a_study_of_failures_only_has_no_pictures(open_page):
    page = open_page("all failed")
    assert "No run finished" in page.inner_text("main")
    assert page.locator(".plot").count() == 0
