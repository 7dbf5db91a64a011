"""The served example answers as the model does, alone and in batches, while models are replaced."""

# ruff: noqa: E402  (what may not be installed comes before what needs it)

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cprec_recbole import CompressionConfig, CompressionError, compress, load_pretrained

pytest.importorskip("fastapi", reason="fastapi is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
parser = pytest.importorskip(
    "prometheus_client.parser", reason="prometheus-client is not installed"
)

from fastapi.testclient import TestClient

from examples.serve import __main__ as command
from examples.serve import load, prepare
from examples.serve.app import create_app
from examples.serve.batching import Batcher, Busy
from examples.serve.messages import MAX_BODY, MAX_HISTORIES, MAX_HISTORY, MAX_K
from examples.serve.models import Question, Served, answers

ROOT = Path(__file__).parent.parent
SMALL = {"ranks": [16, 4, 2], "cutoffs": [6, 20]}
N_ITEMS = 40  # of the made-up data set


@pytest.fixture(scope="module")
def models(world):
    """Two models of the same catalogue that recommend different items, in float64: what is alone in
    a batch and what is not are then the same to the last digit that counts."""
    torch.manual_seed(3)
    host = world.model("SASRec", initializer_range=1.0).double().eval()
    whole = compress(host, CompressionConfig.uncompressed())
    return {"whole": whole, "small": compress(host, **SMALL)}


@pytest.fixture
def folders(models, tmp_path):
    return {name: model.save_pretrained(tmp_path / name) for name, model in models.items()}


@pytest.fixture
def client(folders):
    with TestClient(create_app(folders, max_wait=0), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    return Served.load(models["small"].save_pretrained(tmp_path_factory.mktemp("served")), 1)


def asked(client, path="/recommend", **body):
    return client.post(path, json=body)


def samples(client):
    """All figures of /metrics, by name and labels."""
    text = client.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "small"])
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("k", [1, 7, N_ITEMS - 3])
def test_an_answer_is_recommend_tokens(client, models, name, exclude_seen, k):
    history = ["i3", "i1", "i7"]
    best = models[name].recommend_tokens([history], k, exclude_seen=exclude_seen)
    found = asked(client, history=history, k=k, exclude_seen=exclude_seen, model=name)
    assert found.status_code == 200
    answer = found.json()
    assert answer["tokens"] == best.tokens[0]
    assert answer["scores"] == pytest.approx(best.scores[0].tolist(), abs=1e-9)
    assert (answer["model"], answer["version"], answer["batch"]) == (name, 1, 1)
    assert answer["skipped"] == []
    assert answer["milliseconds"] > 0


def test_the_first_model_answers_requests_that_name_none(client):
    assert asked(client, history=["i1"]).json()["model"] == "whole"


def test_whole_numbers_stand_for_their_digits(models, tmp_path):
    tokens = [str(number) for number in range(1, models["small"].n_items)]
    folder = models["small"].save_pretrained(tmp_path, tokens)
    with TestClient(create_app({"small": folder})) as client:
        one, other = asked(client, history=[3, 11]), asked(client, history=["3", "11"])
    assert one.json()["tokens"] == other.json()["tokens"]


def test_unknown_tokens_are_skipped_and_named_or_an_error(client):
    known = asked(client, history=["i1", "i2"]).json()
    answer = asked(client, history=["new", "i1", "newer", "i2", "new"]).json()
    assert answer["skipped"] == ["new", "newer", "new"]
    assert (answer["tokens"], answer["scores"]) == (known["tokens"], known["scores"])
    found = asked(client, history=["i1", "new"], strict=True)
    assert found.status_code == 422
    assert "tokens of the catalogue, but 1 of 2 are not in it: 'new'" in found.json()["error"]


def test_many_histories_get_an_answer_or_an_error_each(client, models):
    histories = [["i1"], [], ["new"], ["i2", "i3", "new"]]
    found = asked(client, "/recommend/many", histories=histories, k=4).json()["answers"]
    best = models["whole"].recommend_tokens([["i1"], ["i2", "i3"]], 4)
    assert [found[0]["tokens"], found[3]["tokens"]] == best.tokens
    assert found[3]["skipped"] == ["new"]
    assert "it is empty" in found[1]["error"]
    assert "a token of the catalogue" in found[2]["error"]


def test_what_is_served_can_be_asked_for(client, models):
    assert client.get("/health").json() == {"status": "ok", "versions": {"whole": 1, "small": 1}}
    found = client.get("/models").json()
    assert list(found) == ["whole", "small"]
    for name, model in models.items():
        assert found[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert found[name]["bytes"] == 8 * found[name]["parameters"]
        assert found[name]["items"] == model.n_items - 1


# -- bad requests ----------------------------------------------------------------------------------

BAD = {
    "no JSON": (b'{"history": ["i1"', "not JSON"),
    "no object": (b'["i1"]', "Expected a JSON object"),
    "nothing": (b"", "Expected a JSON object"),
    "no history": (b"{}", "history: Field required"),
    "empty": (b'{"history": []}', "history: an empty history; give at least one token"),
    "no list": (b'{"history": "i1"}', "history: Input should be a valid list"),
    "an empty token": (b'{"history": [""]}', "history.0: .* at least 1 "),
    "true": (b'{"history": [true]}', r"history.0: Input should be a valid string"),
    "a fraction": (b'{"history": [1.5]}', r"history.0: Input should be a valid string"),
    "NaN": (b'{"history": [NaN]}', r"history.0: Input should be a valid string"),
    "half a letter": (b'{"history": ["i1", "\\ud800"]}', "history.1: .*cannot be written as UTF-8"),
    "a long token": (json.dumps({"history": ["x" * 201]}).encode(), "history.0: .*at most 200"),
    "k 0": (b'{"history": ["i1"], "k": 0}', "k: .*greater than or equal to 1"),
    "k -1": (b'{"history": ["i1"], "k": -1}', "k: .*greater than or equal to 1"),
    "k true": (b'{"history": ["i1"], "k": true}', "k: .*valid integer"),
    "k a text": (b'{"history": ["i1"], "k": "5"}', "k: .*valid integer"),
    "k huge": (b'{"history": ["i1"], "k": 1e400}', "k: "),
    "k above the limit": (b'{"history": ["i1"], "k": 1001}', f"k: .*less than .* {MAX_K}"),
    "k above the catalogue": (b'{"history": ["i1"], "k": 41}', r"`k` to be from 1 to the \d+ "),
    "k above what is left": (
        b'{"history": ["i1", "i2", "i1"], "k": 40, "exclude_seen": true}',
        r"`k` to be from 1 to the \d+ items that may be recommended, but got 40",
    ),
    "a typing error": (b'{"history": ["i1"], "exclude_sen": true}', "exclude_sen: Extra inputs"),
    "half a letter as a name": (b'{"history": ["i1"], "\\ud800": 1}', "Extra inputs|JSON object"),
    "nothing known": (b'{"history": ["new"]}', "1 of 1 are not in it: 'new'"),
    "a long history": (
        json.dumps({"history": ["i1"] * (MAX_HISTORY + 1)}).encode(),
        f"history: .* at most {MAX_HISTORY} items",
    ),
    "many mistakes": (json.dumps({"history": [None] * 900}).encode(), "; and 897 more$"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong(client, name):
    body, match = BAD[name]
    found = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 422
    assert list(found.json()) == ["error"]
    assert len(found.content) < 1000
    with pytest.raises(ValueError, match=match):
        raise ValueError(found.json()["error"])
    assert asked(client, history=["i1"]).status_code == 200


def test_a_request_is_bounded(client):
    found = client.post("/recommend", content=b" " * (MAX_BODY + 1))
    assert found.status_code == 413
    assert "at most 1,048,576 bytes" in found.json()["error"]
    pieces = (b" " * 2**16 for _ in range(17))  # no Content-Length
    assert client.post("/recommend", content=pieces).status_code == 413
    deep = b'{"history":' + b"[" * 100_000
    found = client.post("/recommend", content=deep, headers={"content-type": "application/json"})
    assert found.status_code in (400, 422)
    assert "error" in found.json()
    found = asked(client, "/recommend/many", histories=[["i1"]] * (MAX_HISTORIES + 1))
    assert f"at most {MAX_HISTORIES}" in found.json()["error"]
    found = asked(client, "/recommend/many", histories=[["i1"], ["i1"] * (MAX_HISTORY + 1)])
    assert f"at most {MAX_HISTORY}" in found.json()["error"]


def test_a_model_or_a_path_that_there_is_not(client):
    for path, body in (("/recommend", {"history": ["i1"]}), ("/reload", {})):
        found = asked(client, path, model="large", **body)
        assert found.status_code == 404
        assert "one of whole, small, but got 'large'" in found.json()["error"]
    assert client.get("/nothing").status_code == 404
    assert client.get("/recommend").status_code == 405
    assert client.get("/page/../app.py").status_code == 404


# -- batches ---------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, N_ITEMS - 5).map("i{}".format), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(st.tuples(TOKENS, st.integers(1, 10), st.booleans()), max_size=8))
def test_a_batch_is_its_questions_one_by_one(served, asked):
    known = served.model.known_vocabulary()
    questions = [
        Question(served, [token for token in history if token in known] or ["i1"], k, exclude)
        for history, k, exclude in asked
    ]
    together = answers(questions)
    for question, found in zip(questions, together, strict=True):
        (alone,) = answers([question])
        assert found.tokens == alone.tokens
        assert len(found.tokens) == question.k
        assert found.scores == pytest.approx(alone.scores, abs=1e-9)
        assert alone.batch == 1 <= found.batch


def test_a_question_that_fails_fails_alone(served):
    good, other = Question(served, ["i1"], 3), Question(served, ["i2", "i3"], 5)
    found = answers([good, Question(served, ["i1"], 10_000), other, Question(served, ["new"], 1)])
    assert [type(each) for each in (found[1], found[3])] == [CompressionError] * 2
    assert found[0].tokens == answers([good])[0].tokens
    assert found[2].tokens == answers([other])[0].tokens


def test_a_large_k_beside_a_history_that_leaves_few(served):
    """Together they would ask for more than the second has left."""
    tokens = served.model.known_vocabulary().tokens
    wide = Question(served, tokens[:1], served.n_items - 1, True)
    long = Question(served, tokens[:-3], 3, True)
    found = answers([wide, long])
    assert set(found[0].tokens) == set(tokens[1:])
    assert set(found[1].tokens) == set(tokens[-3:])


def test_requests_at_a_time_are_answered_together_and_rightly(folders, models):
    histories = [[f"i{n % 9}", f"i{n % 7}"] for n in range(60)]

    async def run():
        app = create_app(folders, max_batch=16, max_wait=0.05)
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app), http(transport) as client:
            bodies = [{"history": h, "k": 1 + n % 5} for n, h in enumerate(histories)]
            bodies.insert(30, {"history": ["new"]})
            return await asyncio.gather(*(client.post("/recommend", json=b) for b in bodies))

    found = asyncio.run(run())
    assert found.pop(30).status_code == 422
    assert {each.status_code for each in found} == {200}
    assert max(each.json()["batch"] for each in found) > 1
    for n, (history, each) in enumerate(zip(histories, found)):
        best = models["whole"].recommend_tokens([history], 1 + n % 5)
        assert each.json()["tokens"] == best.tokens[0]


def http(transport):
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def batched(questions, answer, **options):
    """What a batcher gives for questions that are asked at once, and the sizes of its batches."""
    sizes = []

    async def run():
        batcher = Batcher(answer, observe=sizes.append, **options)
        await batcher.start()
        found = await asyncio.gather(*map(batcher.ask, questions), return_exceptions=True)
        await batcher.stop()
        return found

    return asyncio.run(run()), sizes


def test_a_full_batch_does_not_wait():
    found, sizes = batched(range(12), lambda batch: [-n for n in batch], max_batch=4, max_wait=1e6)
    assert found == [-n for n in range(12)]
    assert sizes == [4, 4, 4]


def test_a_batch_that_fails_leaves_the_next_ones_alone():
    def answer(batch):
        if 2 in batch:
            raise RuntimeError("broken")
        return [KeyError("this one") if n == 5 else n for n in batch]

    found, _ = batched(range(8), answer, max_batch=4, max_wait=1e6)
    assert all(isinstance(each, RuntimeError) for each in found[:4])
    assert isinstance(found[5], KeyError)
    assert [found[4], *found[6:]] == [4, 6, 7]


def test_what_comes_during_a_call_is_the_next_batch():
    free, started, seen = threading.Event(), threading.Event(), []

    def answer(batch):
        seen.append(list(batch))
        started.set()
        assert free.wait(30)
        return batch

    async def run():
        batcher = Batcher(answer, max_wait=0, max_waiting=4)
        await batcher.start()
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.to_thread(started.wait, 30)
        later = [asyncio.create_task(batcher.ask(n)) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="4 requests wait already"):
            await batcher.ask(5)
        later[1].cancel()
        free.set()
        stopping = asyncio.create_task(batcher.stop())
        found = await asyncio.gather(first, *later, return_exceptions=True)
        await stopping
        with pytest.raises(Busy, match="is ending"):
            await batcher.ask(6)
        return found

    found = asyncio.run(run())
    assert isinstance(found.pop(2), asyncio.CancelledError)
    assert found == [0, 1, 3, 4]
    assert seen == [[0], [1, 3, 4]]


# -- reloading -------------------------------------------------------------------------------------


def test_a_reload_drops_nothing_and_every_answer_is_of_one_model(folders, models):
    """The folder holds one model, then the other, and so on; an answer says its version."""
    order = [models["whole"], models["small"]]
    histories = [[f"i{n % 8}", f"i{n % 5}"] for n in range(40)]
    wanted = [model.recommend_tokens(histories, 5).tokens for model in order]
    assert wanted[0] != wanted[1]
    answered = []

    async def ask(client, going):
        while going.is_set():
            for n, history in enumerate(histories):
                body = {"history": history, "k": 5}
                answered.append((n, await client.post("/recommend", json=body)))

    async def run():
        app = create_app({"whole": folders["whole"]}, max_wait=0)
        async with (
            app.router.lifespan_context(app),
            http(httpx.ASGITransport(app=app)) as client,
        ):
            going = asyncio.Event()
            going.set()
            asking = [asyncio.create_task(ask(client, going)) for _ in range(4)]
            for version in range(2, 7):
                order[(version - 1) % 2].save_pretrained(folders["whole"])
                found = await client.post("/reload")
                assert found.json()["whole"]["version"] == version
            going.clear()
            await asyncio.gather(*asking)

    asyncio.run(run())
    assert {answer.status_code for _, answer in answered} == {200}
    assert len({answer.json()["version"] for _, answer in answered}) > 2
    for n, answer in answered:
        found = answer.json()
        assert found["tokens"] == wanted[(found["version"] - 1) % 2][n]


def test_a_broken_folder_leaves_the_old_model_serving(client, folders, models):
    before = asked(client, history=["i1", "i2"], model="small").json()["tokens"]
    weights = next(folders["small"].glob("weights-*"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    found = client.post("/reload")  # of both: the other one is loaded
    assert found.status_code == 409
    assert "small: " in found.json()["error"]
    assert "cut short" in found.json()["error"]
    assert client.get("/health").json()["versions"] == {"whole": 2, "small": 1}
    assert asked(client, history=["i1", "i2"], model="small").json()["tokens"] == before
    (folders["small"] / "config.json").unlink()
    assert asked(client, "/reload", model="small").status_code == 409
    models["small"].save_pretrained(folders["small"])
    assert asked(client, "/reload", model="small").json()["small"]["version"] == 2
    found = samples(client)
    assert found["cprec_reloads_total", "failed", "small"] == 2
    assert found["cprec_reloads_total", "done", "small"] == 1
    assert found["cprec_model_version", "small"] == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_sighup_loads_all_again(folders):
    async def run():
        app = create_app(folders)
        slots = app.state.service.slots.values()
        async with app.router.lifespan_context(app):
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(30) if hasattr(asyncio, "timeout") else Nothing():
                while {slot.served.version for slot in slots} != {2}:
                    await asyncio.sleep(0.01)

    before = signal.getsignal(signal.SIGHUP)
    asyncio.run(run())
    assert signal.getsignal(signal.SIGHUP) == before


class Nothing:
    async def __aenter__(self):
        pass

    async def __aexit__(self, *raised):
        pass


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_count_what_happened(client, models):
    for _ in range(3):
        asked(client, history=["i1"])
    asked(client, history=[])
    asked(client, "/recommend/many", histories=[["i1"], ["i2"]], model="small")
    client.get("/wp-admin")
    client.get("/wp-login")
    found = samples(client)
    assert found["cprec_requests_total", "/recommend", "200"] == 3
    assert found["cprec_requests_total", "/recommend", "422"] == 1
    assert found["cprec_requests_total", "404", "other"] == 2  # any path is one label
    assert found["cprec_errors_total", "/recommend"] == 1
    assert found["cprec_request_seconds_count", "/recommend"] == 4
    assert found["cprec_batch_size_sum", "whole"] == 3
    assert found["cprec_batch_size_sum", "small"] == 2
    parameters = sum(p.numel() for p in models["small"].parameters())
    assert found["cprec_model_parameters", "small"] == parameters
    assert found["cprec_model_bytes", "small"] == 8 * parameters
    assert found["cprec_model_version", "whole"] == 1


def test_who_does_not_wait_for_an_answer_is_no_error(client):
    async def left():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/recommend", "headers": []}
    asyncio.run(client.app.middleware_stack(scope, left, send))
    found = samples(client)
    assert found["cprec_requests_total", "/recommend", "499"] == 1
    assert ("cprec_errors_total", "/recommend") not in found


def test_an_unexpected_error_is_no_traceback(client, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("secret")

    slot = client.app.state.service.slots["whole"]
    monkeypatch.setattr(slot.served.model, "recommend_tokens", broken)
    found = asked(client, history=["i1"])
    assert found.status_code == 500
    assert "secret" not in found.text
    assert asked(client, "/recommend/many", histories=[["i1"]]).status_code == 500
    monkeypatch.undo()
    assert asked(client, history=["i1"]).status_code == 200
    assert samples(client)["cprec_errors_total", "/recommend"] == 1


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], "nowhere"),
        (["a=x", "a=y"], "a name of its own"),
        (["=x"], "a name of its own"),
    ],
)
def test_a_folder_that_cannot_be_served_is_one_line(arguments, match, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert match in said


def test_titles_that_are_none_are_refused_and_unknown_ones_left_out(folders, tmp_path):
    file = tmp_path / "titles.json"
    file.write_text('[{"token": "i1", "title": "One"}, {"token": "new", "title": "Two"}]')
    assert command._titles_beside(folders) == file
    with TestClient(create_app(folders, file)) as client:
        assert client.get("/titles").json() == [{"token": "i1", "title": "One"}]
        assert client.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    for text in ("[", "{}x", "[1]", '[{"title": "x"}]', '[{"token": "i1"}]'):
        file.write_text(text)
        with pytest.raises(CompressionError, match="`titles` to be a JSON list"):
            create_app(folders, file)


def test_prepare_writes_what_is_served(tmp_path, capsys):
    few = ["--user_inter_num_interval=[0,60]", "--MAX_ITEM_LIST_LENGTH=5", "--hidden_size=16"]
    few += ["--inner_size=16", "--n_layers=1", "--epochs", "1", "--recover", "1"]
    prepare.main(["--out", str(tmp_path), "--ratio", "1.5", *few])
    assert "python -m examples.serve " in capsys.readouterr().out
    whole, small = (load_pretrained(tmp_path / name) for name in ("uncompressed", "compressed"))
    assert (whole.quantized, small.quantized) == (None, "int8")
    assert whole.table.ranks == (16,)
    films = json.loads((tmp_path / "titles.json").read_text(encoding="utf-8"))
    by_token = {film["token"]: film for film in films}
    assert by_token["64"]["title"] == "The Shawshank Redemption"
    assert sum(token in whole.known_vocabulary() for token in by_token) == whole.n_items - 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "compressed",
        "titles.json",
        "uncompressed",
    }


def test_the_load_test_counts_no_errors(models, tmp_path, monkeypatch):
    models["whole"].save_pretrained(tmp_path / "uncompressed")
    models["small"].save_pretrained(tmp_path / "compressed")
    for name, value in {"WARM_UP": 4, "ALONE": 2, "K": 5, "LONGEST": 9}.items():
        monkeypatch.setattr(load, name, value)
    found = load.measure(tmp_path, 24, 3)
    assert [each["errors"] for each in found] == ["0", "0"]
    lines = load.table("made-up", tmp_path, found).splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert "nan" not in "".join(lines)


def test_percentiles():
    values = [float(n) for n in range(100, 0, -1)]
    assert [load.percentile(values, share) for share in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert load.percentile([7.0], 50) == 7
