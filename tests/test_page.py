"""`compare.html` says what the runs say, and shows any text as text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cprec_recbole.compare.findings import findings_of
from cprec_recbole.compare.findings.points import ORDER, Point, gaps, make_cells, pareto_front
from cprec_recbole.compare.findings.runs import StudyRun, read_runs, with_comparable_times
from cprec_recbole.compare.findings.searches import Searches
from cprec_recbole.compare.findings.standings import standings, subject_of
from cprec_recbole.compare.page.breakdowns import popularity_picture
from cprec_recbole.compare.page.drawing import round_figures
from cprec_recbole.compare.page.styles import GREY, INK, KNOWN, assign_styles, outline
from cprec_recbole.compare.page.words import cell_words
from cprec_recbole.compare.statistics import paired_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.page import render_page, write_page
from cprec_recbole.config import CompressionError
from tests.studies import failure, grid, record, write_study

OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
HOSTILE = '</script><script>window.hacked = 1</script><b>bold</b> & "%{x}" <!--'


def page_of(folder: Path, records) -> str:
    """The page of a study, without plotly's own code."""
    write_page(write_study(folder / "study", records), folder / "compare.html")
    return (folder / "compare.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def study_in(page: str):
    return json.loads(re.search(r'id="study">(.*?)</script>', page, re.DOTALL).group(1))


class Reader(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements[-1:] and self.elements[-1][0] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).replace("\u00a0", " ").split())


def with_quality(made, value):
    return {**made, "test": {**made["test"], "ndcg@20": value}}


def two_cells():
    """Uncompressed .05 in both; compressed .055 (110%) in one and .045 (90%) in the other."""
    return [
        with_quality(record(dataset, "SASRec", contender, ratio), quality)
        for dataset, contender, ratio, quality in (
            ("ml-100k", "uncompressed", None, 0.05),
            ("ml-100k", "compressed", 4.0, 0.055),
            ("ml-100k", "narrower", 4.0, 0.054),
            ("lastfm", "uncompressed", None, 0.05),
            ("lastfm", "compressed", 4.0, 0.045),
            ("lastfm", "narrower", 4.0, 0.046),
        )
    ]


# words


def test_times_of_another_machine_are_left_out_and_said(tmp_path):
    here = {"processor": "A", "torch_threads": 1, "gpu": None, "python": "3.11"}
    runs = [
        record(contender="uncompressed", environment=here, score_ms=2.0),
        record(contender="uncompressed", environment=here | {"gpu": "H"}, seed=2021, score_ms=90.0),
        record(contender="int8", environment=here | {"python": "3.12"}, score_ms=1.0),
        record(contender="narrower", ratio=4.0, environment=here | {"torch_threads": 2}),
        record(dataset="lastfm", contender="int8", environment={"processor": "B"}, score_ms=5.0),
        failure(contender="hashing", ratio=4.0),
    ]
    page = page_of(tmp_path, runs)
    times = {}
    for run in with_comparable_times(read_runs(tmp_path / "study")):
        times[run.dataset, run.contender, run.seed] = run.score_ms, bool(run.epoch_seconds)
    assert times == {
        ("ml-100k", "uncompressed", 2020): (2.0, True),
        ("ml-100k", "uncompressed", 2021): (None, False),
        ("ml-100k", "int8", 2020): (1.0, True),
        ("ml-100k", "narrower", 2020): (None, False),
        ("lastfm", "int8", 2020): (5.0, True),
        ("ml-100k", "hashing", 2021): (None, False),
    }
    assert "times on the machine of the uncompressed model: 2 of 5 finished runs" in page


def test_the_main_finding_is_computed_from_the_runs(tmp_path):
    text = Reader(page_of(tmp_path, two_cells())).text
    assert "has 100.0% of the uncompressed model's NDCG@20" in text
    assert "the median of 2 comparisons, from 90.0% to 110.0%" in text
    assert "It is not below the uncompressed model in 1 of 2." in text
    assert "the higher NDCG@20 against narrower in 1 of 2." in text


def test_a_worse_compressed_model_is_said_to_be_worse(tmp_path):
    records = [with_quality(r, 0.02) if r["ratio"] else r for r in two_cells()]
    text = Reader(page_of(tmp_path, records)).text
    assert "from 40.0% to 40.0%. It is not below the uncompressed model in 0 of 2." in text


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record()], "Nothing but the uncompressed model was run so far."),
        ([record(contender="compressed", ratio=4.0)], "No uncompressed model was run"),
        (
            [record(), record("lastfm", contender="compressed", ratio=4.0)],
            "have no model and data set in common",
        ),
        ([failure()], "No run finished, so nothing was found."),
        ([with_quality(r, 0.0) for r in two_cells()], "NDCG@20 is zero"),
    ],
    ids=["one run", "no reference", "apart", "all failed", "all zero"],
)
def test_studies_that_prove_nothing_say_so(tmp_path, records, words):
    assert words in Reader(page_of(tmp_path, records)).text


def test_a_search_that_all_seeds_share_is_counted_once(tmp_path):
    search = [{"learning_rate": rate, "valid": 0.05 + rate} for rate in (1e-3, 3e-3)]
    records = [record(seed=seed, search=search) for seed in (1, 2, 3)]
    text = Reader(page_of(tmp_path, records)).text
    assert (
        "3 finished runs, learning rates searched in 2 trainings (the highest won 1 of 1)." in text
    )
    records = [record(search=search[:1])]  # one rate is no search
    text = Reader(page_of(tmp_path / "one", records)).text
    assert "1 finished run." in text
    assert "search of 1" not in text


def test_failed_runs_and_gaps_are_named(tmp_path):
    records = grid(["ml-100k", "lastfm"], ["SASRec"], ["uncompressed", "tree"], [4.0], [1, 2, 3])
    at = lambda r, seed: (r["dataset"], r["contender"], r["seed"]) == ("lastfm", "tree", seed)  # noqa: E731
    records = [r for r in records if not at(r, 2)] + [failure(error="out of memory")]
    text = Reader(page_of(tmp_path, records)).text
    assert (
        "1 run failed: SASRec on ml-100k, length 50: hashing ÷ 8 (seed 2021) out of memory" in text
    )
    assert "SASRec on lastfm, length 50: tree ÷ 4 (2 of 3 seeds)" in text


def test_failures_of_one_reason_stand_together(tmp_path):
    records = [failure(seed=1), failure(seed=2), failure(contender="tree"), failure(error="else")]
    text = Reader(page_of(tmp_path, records)).text
    assert "hashing ÷ 8 (seeds 1 and 2), tree ÷ 8 (seed 2021) CompressionError: Expected" in text
    assert "4 runs failed" in text


def test_shares_of_next_to_nothing_give_way_to_the_quality(tmp_path):
    (cell,) = study_in(page_of(tmp_path / "plain", two_cells()[:2]))
    assert cell["pictures"]["popularity"]["4"]["layout"]["yaxis"]["ticksuffix"] == "%"
    low = {"tail": {"ndcg@20": 1e-5, "cases": 9}}
    high = {"tail": {"ndcg@20": 1e-3, "cases": 9}}
    records = [{**r, "popularity": low if r["ratio"] is None else high} for r in two_cells()[:2]]
    page = page_of(tmp_path / "low", records)
    picture = study_in(page)[0]["pictures"]["popularity"]["4"]
    assert "ticksuffix" not in picture["layout"]["yaxis"]
    assert [trace["y"] for trace in picture["data"]] == [[1e-5], [1e-3]]
    assert "more than 300% on tail" in Reader(page).text


def test_a_study_without_gaps_says_so(tmp_path):
    study = write_study(tmp_path / "study", two_cells())
    for path in (study / "runs").glob("*.json"):
        np.save(path.with_suffix(".npy"), np.full(5, 0.05))
    write_page(study, tmp_path / "compare.html")
    text = Reader((tmp_path / "compare.html").read_text(encoding="utf-8")).text
    assert "No run failed. Every contender was run for every model" in text


def test_each_point_has_command_options_search_and_machine(tmp_path):
    text = Reader(page_of(tmp_path, two_cells())).text
    assert text.count("cprec compare --model SASRec --dataset lastfm --learning_rate=0.001") == 3
    assert "Options: ranks=[64, 16, 4] sharing=cross_block" in text
    assert "Learning rate 0.001, found in a search of 3 runs: 0.0003 (" in text
    assert "python 3.11, torch 2.13.0, processor made up, cores 2" in text


def test_what_was_not_measured_is_said_and_left_out(tmp_path):
    bare = ("popularity", "score_ms", "valid_curve", "search", "options", "epoch_seconds", "bytes")
    records = [{**r, **{name: None for name in bare}} for r in two_cells()]
    page = page_of(tmp_path, records)
    pictures = study_in(page)[0]["pictures"]
    assert pictures["latency"] is None
    assert pictures["popularity"] == {"4": None}
    assert pictures["curves"] == {"4": None}
    assert pictures["size"]["bytes"] is None
    assert pictures["size"]["parameters"] is not None
    assert "quality by popularity: 6 of 6 finished runs (compressed, narrower" in Reader(page).text


def test_numbers_that_are_not_finite_count_as_not_measured(tmp_path):
    runs = write_study(tmp_path, [{**record(), "score_ms": math.nan, "bytes": math.inf}])
    (run,) = read_runs(runs)
    assert run.score_ms is None
    assert run.bytes is None


# pictures


def test_curves_are_of_the_metric_and_at_the_epochs_that_the_runs_say(tmp_path):
    curve = {"valid_curve": [0.1, 0.2], "epochs": 12, "curve_metric": "mrr@20", "eval_step": 5}
    (cell,) = study_in(page_of(tmp_path, [{**record(contender="compressed", ratio=4), **curve}]))
    picture = cell["pictures"]["curves"]["4"]
    assert picture["layout"]["yaxis"]["title"]["text"] == "MRR@20, validation"
    assert picture["data"][0]["x"] == [5, 10]


def test_spread_and_means_are_those_of_the_seeds(tmp_path):
    records = [with_quality(record(seed=s), q) for s, q in ((1, 0.04), (2, 0.05), (3, 0.06))]
    (cell,) = study_in(page_of(tmp_path, records))
    trace = cell["pictures"]["size"]["parameters"]["data"][1]
    assert trace["y"] == pytest.approx([0.05])
    assert trace["error_y"]["array"] == pytest.approx([0.01])


def test_one_seed_has_no_error_bars(tmp_path):
    (cell,) = study_in(page_of(tmp_path, [record()]))
    assert not cell["pictures"]["size"]["parameters"]["data"][1]["error_y"]["visible"]


def test_a_contender_looks_the_same_in_all_pictures(tmp_path):
    looks: dict[str, set] = {}
    for cell in study_in(page_of(tmp_path, grid(["ml-100k", "lastfm"], ["SASRec"], seeds=[1]))):
        pictures = cell["pictures"]
        drawn = [*pictures["size"].values(), pictures["latency"]]
        drawn += [*pictures["popularity"].values(), *pictures["curves"].values()]
        for trace in (trace for picture in drawn for trace in picture["data"]):
            if "meta" in trace and "marker" in trace:
                look = (trace["marker"]["color"], trace["marker"]["symbol"])
                looks.setdefault(trace["meta"], set()).add(look)
    assert looks.keys() == KNOWN.keys()
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == len(KNOWN)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=8), max_size=20))
def test_colours_are_okabe_itos_and_no_two_styles_are_equal(names):
    styles = assign_styles({*names, *KNOWN})
    assert {style.colour for style in styles.values()} <= OKABE_ITO | {INK, GREY}
    assert len({(style.colour, style.symbol) for style in styles.values()}) == len(styles)
    assert all(outline(style) for style in styles.values())


def test_every_known_style_has_its_place_in_the_order():
    assert set(KNOWN) == set(ORDER)


def test_a_names_style_does_not_hang_on_who_else_is_there():
    assert assign_styles(["tree"])["tree"] == assign_styles([*KNOWN, "zebra"])["tree"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_front_holds_what_nothing_dominates(places):
    runs = [
        StudyRun(Path(), f"{i}", "d", "m", 1, i, f"c{i}", None, parameters=x, test={"ndcg@20": y})
        for i, (x, y) in enumerate(places)
    ]
    (cell,) = make_cells(runs)
    beaten = lambda a, b: b[0] <= a[0] and b[1] >= a[1] and b != a  # noqa: E731
    slow = sorted({a for a in places if not any(beaten(a, b) for b in places)})
    assert pareto_front(cell.points, lambda run: run.parameters) == slow


@given(st.floats(1, 1e9), st.floats(1.5625, 1e6))
def test_ticks_are_round_and_within_the_axis(low, factor):
    ticks = round_figures(low, low * factor)
    assert ticks
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0]
    assert ticks[-1] <= low * factor


def test_options_that_differ_make_points_of_their_own(tmp_path):
    schemes = [
        record(contender="compressed", ratio=4.0, seed=s, options={"sharing": scheme})
        for scheme in ("none", "cross_block")
        for s in (1, 2)
    ]
    (cell,) = make_cells(read_runs(write_study(tmp_path, schemes)))
    assert [(p.label.replace("\u00a0", " "), p.seeds) for p in cell.points] == [
        ("compressed ÷ 4 (sharing cross_block)", [1, 2]),
        ("compressed ÷ 4 (sharing none)", [1, 2]),
    ]
    assert gaps([cell]) == []


def test_two_hundred_runs(tmp_path):
    records = grid(["ml-100k", "lastfm"], ["SASRec", "GRU4Rec"], ratios=[4.0, 8.0], seeds=[1, 2])
    assert len(records) >= 200
    page = page_of(tmp_path, records)
    assert len(study_in(page)) == 4
    assert len(page) < 3_000_000


# intervals


def with_users(tmp_path, values):
    """A study whose runs have each test user's NDCG@20 beside them, as far as values are given."""
    records = [r for r in two_cells() if r["dataset"] == "lastfm"]
    means = [with_quality(r, float(np.mean(v))) for r, v in zip(records, values)]
    study = write_study(tmp_path / "study", [*means, *records[len(means) :]])
    for path, array in zip(sorted((study / "runs").glob("*.json")), values):
        np.save(path.with_suffix(".npy"), np.asarray(array))
    return study


def test_intervals_are_of_the_same_users(tmp_path):
    rng = np.random.default_rng(0)
    plain = rng.random(200)
    study = with_users(tmp_path, [plain, plain + 0.25, plain - 0.25 + rng.normal(0, 0.5, 200)])
    found = {p.contender: p for p in findings_of(study).cells[0].points}
    values = [np.load(path) for path in sorted((study / "runs").glob("*.npy"))]
    assert found["compressed"].interval == paired_difference(values[1:2], values[:1])
    assert found["narrower"].to_subject == paired_difference(values[2:], values[1:2])
    assert found["uncompressed"].interval is None
    assert found["compressed"].to_subject is None
    write_page(study, tmp_path / "out.html")
    text = Reader((tmp_path / "out.html").read_text(encoding="utf-8")).text
    assert "+0.2500 [+0.2500, +0.2500]" in text
    assert (
        "the interval of the paired difference over users includes or exceeds zero in 1 of 1"
        in text
    )
    assert "the higher NDCG@20 against narrower in 1 of 1 (1 beyond chance)." in text


def test_a_subject_without_a_ratio_is_compared_with_all_ratios(tmp_path):
    def of(contender, ratio, quality):
        return with_quality(record("lastfm", "SASRec", contender, ratio), quality)

    runs = [of("uncompressed", None, 0.05), of("uncompressed-recovered", None, 0.06)]
    runs += [of("recovered", 4.0, 0.055), of("recovered", 8.0, 0.07)]
    found = findings_of(write_study(tmp_path, runs), "uncompressed-recovered")
    lost = {(s.contender, s.ratio): s.lost for s in standings(found.cells, found.subject)}
    assert lost["recovered", 4.0] == (1, 1)
    assert lost["recovered", 8.0] == (0, 1)
    assert "At equal ratio" not in render_page(found)


def test_shares_and_wins_are_of_the_seeds_that_both_have(tmp_path):
    def of(contender, ratio, seed, quality):
        return with_quality(record("lastfm", "SASRec", contender, ratio, seed), quality)

    runs = [of("uncompressed", None, 1, 0.04), of("uncompressed", None, 2, 0.08)]
    runs += [of("compressed", 4.0, 1, 0.05), of("compressed", 4.0, 2, 0.01)]
    runs += [of("narrower", 4.0, 1, 0.04), of("hashing", 4.0, 3, 0.04)]
    cells = make_cells(read_runs(write_study(tmp_path, runs)))
    found = {s.contender: s for s in standings(cells, "compressed")}
    assert found["compressed"].shares == pytest.approx([0.5])
    assert found["narrower"].shares == pytest.approx([1.0])  # of seed 1 alone
    assert found["narrower"].lost == (1, 1)
    assert (found["hashing"].shares, found["hashing"].lost) == ([], (0, 0))  # no seed in common


def test_the_words_of_a_cell_are_of_the_seeds_that_both_have(tmp_path):
    def of(contender, ratio, seed, quality):
        return with_quality(record("lastfm", "SASRec", contender, ratio, seed), quality)

    runs = [of("uncompressed", None, 1, 0.04), of("uncompressed", None, 2, 0.08)]
    runs += [of("narrower", 4.0, 1, 0.04)]
    (cell,) = make_cells(read_runs(write_study(tmp_path, runs)))
    assert "narrower ÷\u00a04: 0.0400, 100.0% of it" in cell_words(cell)


def test_users_that_do_not_match_are_refused_by_file(tmp_path):
    study = with_users(tmp_path, [[0.0, 1.0], [0.5, 1.0, 1.0]])
    with pytest.raises(CompressionError, match=r"0001\.npy to hold 2 test users.* got 3"):
        write_page(study, tmp_path / "out.html")


def test_without_the_users_values_there_is_no_interval(tmp_path):
    study = with_users(tmp_path, [[0.0, 1.0], [0.5, 1.5]])  # narrower has none
    write_page(study, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("[+0.5000, +0.5000]") == 1
    assert "each test user's NDCG@20: 1 of 3 finished runs (narrower)" in Reader(page).text


def test_a_users_file_that_cannot_be_read_is_named(tmp_path):
    study = with_users(tmp_path, [[0.0, 1.0], [0.5, 1.0]])
    (study / "runs" / "0001.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CompressionError, match=r"0001\.npy to hold a number for each test user"):
        write_page(study, tmp_path / "out.html")


def test_shares_by_popularity_and_the_best_point_are_of_the_seeds_that_both_have(tmp_path):
    def of(contender, ratio, seed, quality):
        made = with_quality(record("lastfm", "SASRec", contender, ratio, seed), quality)
        groups = {"tail": {"ndcg@20": quality / 2, "hit@20": quality, "cases": 9}}
        return {**made, "popularity": groups}

    runs = [of("uncompressed", None, 1, 0.04), of("uncompressed", None, 2, 0.08)]
    runs += [of("compressed", 4.0, 1, 0.05), of("compressed", 4.0, 2, 0.07)]
    runs += [of("narrower", 4.0, 2, 0.064)]  # highest mean, but of the better seed alone
    (cell,) = findings_of(write_study(tmp_path, runs)).cells
    picture = popularity_picture(cell, assign_styles(p.contender for p in cell.points), 4.0)
    shares = {trace["meta"]: trace["y"] for trace in picture["data"] if "meta" in trace}
    assert shares["compressed"] == pytest.approx([100.0])
    assert shares["narrower"] == pytest.approx([80.0])
    assert "best of 2 smaller points is compressed" in cell_words(cell)


# searches


def test_searches_are_those_of_the_first_seed(tmp_path):
    wide = [{"learning_rate": rate, "valid": v} for rate, v in ((1, 0.2), (0.1, 0.3), (0.01, 0.1))]
    narrow = wide[:2]
    runs = [
        record(contender="uncompressed", seed=2020, search=wide, learning_rate=0.1),
        record(contender="uncompressed", seed=2021, search=narrow, learning_rate=0.1),
        record(contender="compressed", ratio=4.0, seed=2020, search=narrow, learning_rate=0.1),
        record(contender="narrower", ratio=4.0, seed=2020, search=wide, learning_rate=0.1),
        record(contender="narrower", ratio=4.0, seed=2021, search=narrow, learning_rate=1),
        record(contender="hashing", ratio=4.0, seed=2020, search=wide[:1], learning_rate=1),
    ]
    searches = Searches(findings_of(write_study(tmp_path, runs)).cells)
    assert searches.trainings == len(runs) + 2 + 1 + 2
    assert searches.edges == (0, 1, 3)  # .1 is between the others but for compressed
    assert [s.replace("\u00a0", " ") for s in searches.unequal] == [
        "SASRec on ml-100k, length 50: fewer learning rates than the 3 of others were tried for "
        "compressed ÷ 4 (2), hashing ÷ 4 (1).",
        "SASRec on ml-100k, length 50: seeds at several learning rates: narrower ÷ 4.",
    ]


# input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"bad\.json to hold a run in JSON"),
        ("[1]", r"bad\.json to hold a run as a JSON object, but got list"),
        ({**record(), "contender": None}, r"bad\.json to hold `contender` as a text"),
        ({**record(), "seed": 1.5}, r"bad\.json to hold `seed` as a whole number, but got 1\.5"),
        ({**record(), "total_parameters": None}, r"bad\.json to hold `total_parameters`"),
        ({**record(), "test": {}}, r"bad\.json to hold `test\.ndcg@20` as a finite number"),
        ({**record(), "test": {"ndcg@20": "high"}}, r"bad\.json to hold `ndcg@20` as a number"),
        (
            {**record(), "popularity": {"head": 1}},
            r"bad\.json to hold `popularity\.head` as an obj",
        ),
        ({**record(), "valid_curve": 3}, r"bad\.json to hold `valid_curve` as a list"),
        ({**record(), "search": [3]}, r"bad\.json to hold `search\.learning_rate`"),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_the_old_page_stays(tmp_path, content, message):
    study = write_study(tmp_path / "study", [record()])
    out = tmp_path / "compare.html"
    out.write_text("old")
    text = content if isinstance(content, str) else json.dumps(content)
    (study / "runs" / "bad.json").write_text(text)
    with pytest.raises(CompressionError, match=message):
        write_page(study, out)
    assert out.read_text() == "old"


@pytest.mark.parametrize("folder", ["nowhere", "empty", "no-runs"])
def test_a_folder_without_runs_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-runs" / "runs").mkdir(parents=True)
    with pytest.raises(CompressionError, match=rf"got no file .*{folder}.runs.\*\.json"):
        write_page(tmp_path / folder, tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    study = write_study(tmp_path / "study", [record()])
    (tmp_path / "taken").mkdir()
    with pytest.raises(CompressionError, match=r"`out` to be a file .*taken"):
        write_page(study, tmp_path / "taken")


# safety


def hostile(text):
    options = {"options": {text: text}, "environment": {text: text}, "command": text}
    return [
        record(text, text, "uncompressed", **options),
        record(text, text, text, 4.0, parameters={text: 5}, **options),
        failure(contender=text, dataset=text, error=text),
    ]


def elements(page):
    return [tag for tag, _ in Reader(page).elements]


@settings(max_examples=10, deadline=None)
@given(text=st.one_of(st.just(HOSTILE), st.text(min_size=1, max_size=30)))
def test_any_text_is_shown_as_text(tmp_path_factory, text):
    study = write_study(tmp_path_factory.mktemp("any"), hostile(text))
    page = render_page(findings_of(study, text)).replace(get_plotlyjs(), "")
    plain = write_study(tmp_path_factory.mktemp("plain"), hostile("plain"))
    assert elements(page) == elements(
        render_page(findings_of(plain, "plain")).replace(get_plotlyjs(), "")
    )
    (cell,) = study_in(page)
    assert cell["dataset"] == text


def test_plotly_is_told_texts_in_entities(tmp_path):
    (cell,) = study_in(page_of(tmp_path, hostile(HOSTILE)))
    for picture in (cell["pictures"]["latency"], cell["pictures"]["parts"]["4"]):
        for trace in picture["data"]:
            trace.pop("meta", None)  # never shown; the legend's button looks for it
        assert "<script" not in json.dumps(picture)
        assert "&lt;script&gt;" in json.dumps(picture)


def test_nothing_is_fetched(tmp_path):
    page = page_of(tmp_path, two_cells())
    for tag, attributes in Reader(page).elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_standings_count_wins_only_where_both_were_run(tmp_path):
    records = [r for r in two_cells() if (r["dataset"], r["contender"]) != ("lastfm", "narrower")]
    cells = make_cells(read_runs(write_study(tmp_path, records)))
    lost = {s.contender: s.lost for s in standings(cells, "compressed")}
    assert lost == {"compressed": (0, 0), "narrower": (1, 1)}


def cells_of(*names):
    """One data set for each list of contenders."""
    return make_cells(
        StudyRun(Path(), f"{d}{n}", f"d{d}", "m", 1, 1, n, 4.0, parameters=8, test={"ndcg@20": 0.1})
        for d, contenders in enumerate(names)
        for n in contenders
    )


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        ([["uncompressed"]], None),
        ([["uncompressed", "narrower", "compressed", "recovered"]], "compressed"),
        ([["recovered-int8", "compressed", "narrower"], ["recovered-int8", "narrower"]],
         "recovered-int8"),
        ([["narrower", "hashing"], ["narrower"]], "narrower"),
    ],
)  # fmt: skip
def test_findings_are_about_what_of_ours_was_run_most_often(names, subject):
    assert subject_of(point.contender for c in cells_of(*names) for point in c.points) == subject


def test_sizes_are_bytes_where_they_are_known():
    def point(**options):
        return Point("c", None, [StudyRun(Path(), "k", "d", "m", 1, 1, "c", None, **options)])

    assert point(parameters=10).size == 40
    assert point(parameters=10, bytes=12.0).size == 12
