"""`compare.html` says what the runs say, and shows any text as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.page import render_page
from cprec_recbole.compare.results import pack_users
from tests.studies import failure, grid, made, study_of

HOSTILE = '</script><script>window.hacked = 1</script><b>bold</b> & "%{x}" {{ 1 }} <!--'


class Reader(HTMLParser):
    """The elements of a page, its text outside of scripts and styles, and the data of its script."""

    def __init__(self, folder: Path, runs) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.page = render_page(study_of(folder, runs)).replace(get_plotlyjs(), "")
        self.texts: list[str] = []
        self.feed(self.page)
        self.text = " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.texts.append(data)

    @property
    def study(self):
        return json.loads(re.search(r"const STUDY = (.*);</script>", self.page).group(1))


def two_cells(**changes):
    """Uncompressed .05 in both; compressed .055 (110%) in one and .045 (90%) in the other."""
    return [
        made(contender, ratio, dataset=dataset, quality=quality, **changes)
        for dataset, contender, ratio, quality in (
            ("ml-100k", "uncompressed", None, 0.05),
            ("ml-100k", "compressed", 4.0, 0.055),
            ("ml-100k", "narrower", 4.0, 0.054),
            ("lastfm", "uncompressed", None, 0.05),
            ("lastfm", "compressed", 4.0, 0.045),
            ("lastfm", "narrower", 4.0, 0.046),
        )
    ]


def test_the_findings_are_computed_from_the_runs(tmp_path):
    text = Reader(tmp_path, two_cells()).text
    assert (
        "SASRec on lastfm and ml-100k, histories of 50 items: 3 contenders, 1 seed, 6 fin" in text
    )
    assert "searched in 18 trainings (the highest won 0 of 6)." in text
    assert (
        "compressed ÷ 4, 4.0 times smaller, has 100.0% of the uncompressed model's NDCG@20 on the "
        "test set: the median of 2 comparisons, from 90.0% to 110.0%. It is not below the "
        "uncompressed model in 1 of 2; the interval of the paired difference over users includes or "
        "exceeds zero in 1 of 2."
    ) in text
    assert "the higher NDCG@20 against narrower in 1 of 2 (1 beyond chance, 1 below it bey" in text
    assert "100% on head, 100% on middle and 100% on tail items" in text
    assert (
        "The best of 2 smaller points is compressed ÷ 4: 0.0550, 110.0% of it, in 173.6 kB" in text
    )
    assert "None reaches 95%" in text  # on lastfm


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([made()], "Nothing but the uncompressed model was run so far."),
        ([made("compressed", 4.0)], "No uncompressed model was run"),
        ([made(), made("compressed", 4.0, model="GRU4Rec")], "no model and data set in common"),
        ([failure()], "No run finished, so nothing was found."),
        ([made(quality=0.0), made("compressed", 4.0)], "NDCG@20 is zero"),
    ],
    ids=["one run", "no reference", "apart", "all failed", "all zero"],
)
def test_studies_that_prove_nothing_say_so(tmp_path, runs, words):
    assert words in Reader(tmp_path, runs).text


def test_shares_are_of_the_seeds_that_both_have(tmp_path):
    runs = [made(seed=1, quality=0.04), made(seed=2, quality=0.08)]
    runs += [made("narrower", 4.0, 1, quality=0.04)]
    page = Reader(tmp_path, runs)
    assert "narrower ÷ 4: 0.0400, 100.0% of it" in page.text
    assert "Asked for, and not there yet: SASRec on ml-100k, length 50: narrower ÷ 4 (seed 2)" in (
        page.text
    )


def test_figures_are_means_with_spreads(tmp_path):
    runs = [made(seed=seed, quality=quality) for seed, quality in ((1, 0.04), (2, 0.05), (3, 0.06))]
    page = Reader(tmp_path, runs)
    assert page.study["cells"][0]["points"][0]["quality"] == pytest.approx([0.05, 0.01])
    assert "0.0500 ± 0.0100" in page.text


def test_intervals_are_shown_where_the_users_figures_are_kept(tmp_path):
    plain = np.random.default_rng(0).random(200)
    runs = [made(users=pack_users(plain)), made("compressed", 4.0, users=pack_users(plain + 0.25))]
    text = Reader(tmp_path, [*runs, made("narrower", 4.0, users=None)]).text
    assert text.count("[+0.2500, +0.2500]") == 1
    assert "1 run kept no figures of each test user: without intervals." in text


def test_times_of_another_machine_are_left_out_and_said(tmp_path):
    runs = [made(), made("compressed", 4.0, environment={"processor": "other"})]
    page = Reader(tmp_path, runs)
    assert [point["ms"] is None for point in page.study["cells"][0]["points"]] == [False, True]
    assert "1 run ran on another machine than the uncompressed model" in page.text


def test_failures_of_one_reason_stand_together(tmp_path):
    runs = [failure(seed=1), failure(seed=2), failure("out of memory", contender="tree", seed=1)]
    text = Reader(tmp_path, [made(seed=1), made(seed=2), *runs]).text
    assert "4 runs failed: " in text
    assert "SASRec on ml-100k, length 50: hashing ÷ 8 (seeds 1 and 2) CompressionError: `r" in text
    assert "tree ÷ 8 (seeds 1 and 2) out of memory" in text  # no rate is known for the second


def test_each_point_says_how_to_repeat_it(tmp_path):
    runs = [made(), made("compressed", 4.0, search={1e-3: 0.3, 3e-3: 0.2}), made("int8")]
    text = Reader(tmp_path, runs).text
    assert "Made by train: ranks=[64, 16] ratio=4.0 made_for=compressed" in text
    assert "Learning rate 0.001; tried: 0.001 (0.3000) and 0.003 (0.2000)." in text
    assert "--only ml-100k_SASRec_L50_compressed_r4_s2020" in text
    assert "python 3.11, torch 2.13.0, processor made up" in text
    assert "fewer learning rates than the 3 of others were tried for compressed ÷ 4 (2)." in text


def test_what_was_not_measured_is_left_out(tmp_path):
    bare = dict.fromkeys(("score_ms", "valid_curve", "epoch_seconds", "bytes"))
    points = Reader(tmp_path, two_cells(popularity={}, **bare)).study["cells"][0]["points"]
    assert all(not p["groups"] and p["ms"] is None and not p["curve"] for p in points)
    assert [p["bytes"] for p in points] == [4 * p["parameters"] for p in points]


def test_any_text_is_shown_as_text(tmp_path):
    def named(text):
        about = {"options": {text: text}, "environment": {text: text}, "parameters": {text: 5}}
        runs = [made(**about), made(text, 4.0, popularity={text: {"ndcg@20": 0.1}}, **about)]
        return [*runs, failure(text, contender="narrower")]

    hostile = Reader(tmp_path / "hostile", named(HOSTILE))
    plain = Reader(tmp_path / "plain", named("plain"))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.study["contenders"][1] == HOSTILE
    assert " ".join(HOSTILE.split()) in hostile.text


def test_nothing_is_fetched(tmp_path):
    page = Reader(tmp_path, grid(["uncompressed", "compressed"]))
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
    assert "url(" not in page.page
    assert "default-src 'none'" in page.page
