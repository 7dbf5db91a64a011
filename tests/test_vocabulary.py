"""Tokens and ids: against a list and a dict, and through files."""

import copy
import pickle
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec_recbole import CompressionError, Vocabulary
from cprec_recbole.models import vocabulary
from cprec_recbole.models.vocabulary import as_vocabulary

# what JSON has to escape, or could be taken for the end of a text, besides any other character
letters = st.one_of(st.sampled_from('",\\[]\n\t é€😀ab'), st.characters(codec="utf-8"))
texts = st.text(letters, min_size=1, max_size=6)
catalogues = st.lists(texts, unique=True, max_size=40)


def hashed_in(monkeypatch, buckets):
    """Hashes that collide: all of them, or many."""
    monkeypatch.setattr(vocabulary, "_hash", lambda token: len(token) % buckets)


@pytest.mark.parametrize("buckets", [None, 1, 3])
def test_it_is_a_list_and_a_dict(buckets):
    @settings(max_examples=60, deadline=None)
    @given(catalogues, st.lists(texts, max_size=12))
    def check(tokens, others):
        known = Vocabulary(iter(tokens))
        ids = {token: item for item, token in enumerate(tokens, start=1)}
        assert len(known) == len(tokens)
        assert known.tokens == tuple(tokens)
        assert [known.token(item) for item in range(1, len(tokens) + 1)] == tokens
        history = [*tokens[::-1], *others, *tokens[:3]]
        assert [token in known for token in history] == [token in ids for token in history]
        assert known.ids(history, "skip") == [ids[token] for token in history if token in ids]
        assert known == Vocabulary(tokens)
        assert (known == Vocabulary([*tokens, "one more letter"])) is False
        for twin in (pickle.loads(pickle.dumps(known)), copy.deepcopy(known)):
            assert twin.ids(tokens) == list(range(1, len(tokens) + 1))

    with pytest.MonkeyPatch.context() as patch:
        if buckets is not None:
            hashed_in(patch, buckets)
        check()


@pytest.mark.parametrize("buckets", [None, 1])
def test_a_token_that_comes_twice_is_named(monkeypatch, buckets):
    if buckets is not None:
        hashed_in(monkeypatch, buckets)
    with pytest.raises(CompressionError, match="'b' stands for two"):
        Vocabulary(["a", "b", "c", "b"])


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (["a", ""], "one character or more, but got ''"),
        (["a", 7], "but got 7"),
        (["a", None], "but got None"),
        (["a\ud800"], "written as UTF-8"),
    ],
)
def test_what_is_no_token_is_named(tokens, match):
    with pytest.raises(CompressionError, match=match):
        Vocabulary(tokens)


def test_what_is_unknown_is_named_warned_of_or_skipped():
    known = Vocabulary(["a", "b", "7"])
    with pytest.raises(CompressionError, match="1 of 2 tokens are not in it: 'x'"):
        known.ids(["a", "x"])
    with pytest.warns(UserWarning, match="'x', 'y'; they are left out"):
        assert known.ids(["x", "b", "y"], "warn") == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known.ids(["x", "b", 7], "skip") == [2, 3]
    assert 7 not in known


def test_a_list_that_does_not_fit_the_catalogue_is_refused():
    assert as_vocabulary(["a", "b"], 3).tokens == ("a", "b")
    for wrong in (["a"], "ab", 7, Vocabulary(["a"])):
        with pytest.raises(CompressionError, match="2 texts, one for each item"):
            as_vocabulary(wrong, 3)
