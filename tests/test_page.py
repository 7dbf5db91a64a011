"""`compare.html` says what the runs say, and shows any text as text."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.page import render_page
from cprec_recbole.compare.results import pack_users
from tests.studies import failure, made, study_of

HOSTILE = '</script><script>window.hacked = 1</script><b>bold</b> & "%{x}" {{ 1 }} <!--'


class Reader(HTMLParser):
    """The elements of a page, its text outside of scripts and styles, and its script's data."""

    def __init__(self, folder, runs) -> None:
        super().__init__()
        self.page = render_page(study_of(folder, runs)).replace(get_plotlyjs(), "")
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(self.page)
        self.text = " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.texts.append(data)

    def points(self):
        study = json.loads(re.search(r"const STUDY = (.*);</script>", self.page).group(1))
        return study["cells"][0]["points"]


def two_cells(**changes):
    """Uncompressed .05 in both; compressed .055 (110%) in one and .045 (90%) in the other."""
    qualities = {"ml-100k": (0.05, 0.055, 0.054), "lastfm": (0.05, 0.045, 0.046)}
    return [
        made(contender, ratio, dataset=dataset, quality=quality, **changes)
        for dataset, each in qualities.items()
        for (contender, ratio), quality in zip(
            (("uncompressed", None), ("compressed", 4.0), ("narrower", 4.0)), each
        )
    ]


def test_the_findings_are_computed_from_the_runs(tmp_path):
    text = Reader(tmp_path, two_cells()).text
    for words in (
        "SASRec on lastfm and ml-100k, histories of 50 items: 3 contenders, 1 seed, 6 finished "
        "runs, learning rates searched in 18 trainings (the highest won 0 of 6).",
        "compressed ÷ 4, 4.0 times smaller, has 100.0% of the uncompressed model's NDCG@20 on the "
        "test set: the median of 2 comparisons, from 90.0% to 110.0%. It is not below the "
        "uncompressed model in 1 of 2; the interval of the paired difference over users includes "
        "or exceeds zero in 1 of 2.",
        "the higher NDCG@20 against narrower in 1 of 2 (1 beyond chance, 1 below it beyond chance)",
        "100% on head, 100% on middle and 100% on tail items",
        "The best of 2 smaller points is compressed ÷ 4: 0.0550, 110.0% of it, in 173.6 kB",
        "None reaches 95%",  # on lastfm
    ):
        assert words in text


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


def test_means_are_over_seeds_and_shares_of_the_seeds_that_both_have(tmp_path):
    runs = [made(seed=1, quality=0.04), made(seed=2, quality=0.08)]
    page = Reader(tmp_path, [*runs, made("narrower", 4.0, 1, quality=0.04)])
    assert page.points()[0]["quality"] == pytest.approx([0.06, 0.0282842712])
    assert "0.0600 ± 0.0283" in page.text
    assert "narrower ÷ 4: 0.0400, 100.0% of it" in page.text
    assert "not there yet: SASRec on ml-100k, length 50: narrower ÷ 4 (seeds 2)" in page.text


def test_intervals_and_times_are_shown_where_they_can_be(tmp_path):
    plain = np.random.default_rng(0).random(200)
    runs = [made(users=pack_users(plain)), made("compressed", 4.0, users=pack_users(plain + 0.25))]
    other = made("narrower", 4.0, users=None, environment={"processor": "other"}, popularity={})
    page = Reader(tmp_path, [*runs, other])
    assert page.text.count("[+0.2500, +0.2500]") == 1
    assert [point["ms"] is None for point in page.points()] == [False, False, True]
    assert "1 run kept no figures of each test user: without intervals." in page.text
    assert "1 run ran on another machine than the uncompressed model" in page.text


def test_failures_of_one_reason_stand_together(tmp_path):
    runs = [failure(seed=1), failure(seed=2), failure("out of memory", contender="tree", seed=1)]
    text = Reader(tmp_path, [made(seed=1), made(seed=2), *runs]).text
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


def test_any_text_is_shown_as_text_and_nothing_is_fetched(tmp_path):
    def named(text):
        about = {"options": {text: text}, "environment": {text: text}, "parameters": {text: 5}}
        runs = [made(**about), made(text, 4.0, popularity={text: {"ndcg@20": 0.1}}, **about)]
        return Reader(tmp_path / text[-5:], [*runs, failure(text, contender="narrower")])

    hostile = named(HOSTILE)
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in named("plain").elements]
    assert hostile.points()[1]["contender"] == HOSTILE
    assert " ".join(HOSTILE.split()) in hostile.text
    assert "default-src 'none'" in hostile.page
    assert not any("src" in attributes for _, attributes in hostile.elements)
