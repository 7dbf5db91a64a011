"""The page of the served example in a headless Chromium, at desktop and phone width."""

# ruff: noqa: E402  (what may not be installed comes before what needs it)

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cprec_recbole import CompressionConfig, compress

for package in ("fastapi", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from examples.serve.app import create_app

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is here")

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
HOSTILE = "<img src=x onerror=window.hacked=1><b>" + "long" * 30
# texts that leave their card or the window
CUT_OFF = """() => [...document.querySelectorAll('h1, h2, p, dt, dd, .title, .also, button, label')]
  .filter((each) => each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 0
    && getComputedStyle(each).display !== 'inline'
    || each.getBoundingClientRect().right > innerWidth)
  .map((each) => each.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def models(world: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    host = world.model("SASRec", initializer_range=1.0).eval()
    whole = compress(host, CompressionConfig.uncompressed())
    small = compress(host, ranks=[16, 4, 2], cutoffs=[6, 20], dtype="int8")
    return {"uncompressed": whole, "compressed": small}


@pytest.fixture(scope="module")
def folders(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("served")
    return {name: model.save_pretrained(out / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def titles(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    films = [
        {"token": token, "title": f"Film {token}", "year": "1995"}
        for token in models["uncompressed"].known_vocabulary().tokens
    ]
    films[0]["title"] = HOSTILE
    file = tmp_path_factory.mktemp("titles") / "titles.json"
    file.write_text(json.dumps(films))
    return file


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], titles: Path) -> Iterator[Any]:
    """Starts a service in a thread, with titles or without, and gives its address."""
    running: dict[bool, tuple[str, Any, threading.Thread]] = {}

    def start(with_titles: bool = True) -> str:
        if with_titles not in running:
            app = create_app(folders, titles if with_titles else None)
            listening = socket.socket()
            listening.bind(("127.0.0.1", 0))
            listening.listen()  # who comes before the server has started waits
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            running[with_titles] = (address, server, thread)
        return running[with_titles][0]

    yield start
    for _, server, thread in running.values():
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, served: Any) -> Iterator[Any]:
    """Opens the page; at the end no script may have failed and nothing come from elsewhere."""
    problems: list[str] = []
    pages = []

    def start(width: str = "desktop", scheme: str = "light", with_titles: bool = True) -> Any:
        wide, high = WIDTHS[width]
        address = served(with_titles)
        page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: complaint(message.text))
        page.on("request", lambda r: None if r.url.startswith(address) else elsewhere(r.url))
        page.goto(address)
        page.wait_for_selector(".card")
        pages.append(page)
        return page

    def complaint(text: str) -> None:
        if "status of 422" not in text:  # an answer that a test asked for
            problems.append(text)

    def elsewhere(url: str) -> None:
        if not url.startswith("data:"):
            problems.append(url)

    yield start
    for page in pages:
        page.close()
    assert problems == []


def pick(page: Any, *tokens: str) -> None:
    for token in tokens:
        with page.expect_response(lambda r: '"model":"compressed"' in (r.request.post_data or "")):
            page.click(f"#found [data-token={token}]")
    sync_api.expect(page.locator(".waiting")).to_have_count(0)


def listed(page: Any, model: str) -> list[str]:
    """The titles that a model recommends, without years."""
    found: list[str] = page.evaluate(
        "model => [...document.querySelectorAll(`[data-model=${model}] .best .title`)]"
        ".map((title) => title.firstChild.textContent)",
        model,
    )
    return found


def named(tokens: list[str], first: str) -> list[str]:
    return [HOSTILE if token == first else f"Film {token}" for token in tokens]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_both_models_recommend_beside_each_other(open_page, models, width, scheme):
    page = open_page(width, scheme)
    first = models["uncompressed"].known_vocabulary().token(1)
    tokens = [token for token in ("i3", "i5", "i2") if token != first]
    pick(page, *tokens)
    lists = {}
    for name, model in models.items():
        best = model.recommend_tokens([tokens], 10, exclude_seen=True)
        lists[name] = best.tokens[0]
        assert listed(page, name) == named(best.tokens[0], first)
        card = page.locator(f"[data-model={name}]")
        assert card.locator(".ms").inner_text().endswith(" ms")
        assert card.locator(".bytes").inner_text().endswith((" kB", " bytes"))
    both = set(lists["uncompressed"]) & set(lists["compressed"])
    assert page.inner_text("#agreement") == f"{len(both)} of 10 are on both lists."
    assert page.locator("[data-model=compressed] .only").count() == 10 - len(both)
    left, right = (page.locator(f"[data-model={name}]").bounding_box() for name in models)
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("window.hacked") is None


def test_films_are_found_by_title_and_removed(open_page, models):
    page = open_page()
    shown = page.locator("#found button")
    everything = shown.count()
    assert everything == models["uncompressed"].n_items - 1
    page.fill("#search", "FILM I1")
    assert 0 < shown.count() < everything
    page.fill("#search", "no such film")
    assert (shown.count(), page.inner_text("#more")) == (0, "No film has this in its title.")
    page.fill("#search", "film i7")
    page.press("#search", "Enter")
    page.wait_for_selector(".best li")
    assert page.locator("#picked button").all_inner_texts() == ["Film i7"]
    assert shown.count() == everything - 1
    page.click("#picked button")
    sync_api.expect(page.locator(".best li")).to_have_count(0)
    assert page.locator("#nothing").is_visible()
    pick(page, "i2", "i3")
    page.select_option("#k", "5")
    sync_api.expect(page.locator(".best li")).to_have_count(10)
    page.click("#clear")
    sync_api.expect(page.locator(".best li")).to_have_count(0)


def test_an_error_of_the_service_is_shown_and_goes_away(open_page):
    page = open_page()
    page.evaluate(
        "() => { const real = window.fetch; let broken = true;"
        " window.fetch = (...all) => { if (!broken) return real(...all); broken = false;"
        ' return Promise.resolve(new Response(\'{"error": "too much <b>to</b> do"}\','
        " { status: 503 })); }; }"
    )
    page.click("#found [data-token=i3]")
    sync_api.expect(page.locator("#error")).to_have_text("too much <b>to</b> do")
    pick(page, "i2")
    assert page.locator("#error").is_hidden()


def test_without_titles_tokens_can_be_typed(open_page, models):
    page = open_page(with_titles=False)
    assert "no titles" in page.inner_text("#more")
    page.fill("#search", "i3")
    page.press("#search", "Enter")
    page.wait_for_selector(".best li")
    best = models["compressed"].recommend_tokens([["i3"]], 10, exclude_seen=True)
    assert listed(page, "compressed") == best.tokens[0]
    page.click("#clear")
    page.fill("#search", "nothing known")
    page.press("#search", "Enter")
    sync_api.expect(page.locator("#error")).to_contain_text("a token of the catalogue")
