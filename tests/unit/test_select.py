"""Which documents a sample takes: every threshold holds for every input."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3jax.retrieval.hits import Hits
from cm3jax.retrieval.select import SelectionConfig, draw, drop_tokens, select

DOCUMENTS, WIDTH, QUERIES = 24, 4, 6


@dataclasses.dataclass(frozen=True)
class Case:
    by_image: Hits
    by_text: Hits
    queries: np.ndarray
    bank: np.ndarray
    complete: np.ndarray
    own: np.ndarray

    def select(self, config):
        return select(self.by_image, self.by_text, self.queries, self.bank, self.complete, self.own, config)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@st.composite
def cases(draw_):
    rng = np.random.default_rng(draw_(st.integers(0, 2**32 - 1)))
    bank = unit(rng.normal(size=(DOCUMENTS, WIDTH)))
    bank[rng.integers(DOCUMENTS, size=6)] = bank[0]  # exact duplicates
    own = rng.integers(-1, DOCUMENTS, QUERIES)
    queries = unit(np.where(own[:, None] < 0, rng.normal(size=(QUERIES, WIDTH)), bank[own]))

    def found():
        ids = np.stack([rng.permutation(DOCUMENTS)[:12] for _ in range(QUERIES)]).astype(np.int64)
        scores = -np.sort(-rng.uniform(-1, 1, ids.shape)).astype(np.float32)
        gone = np.arange(12) >= rng.integers(0, 13, (QUERIES, 1))
        return Hits(np.where(gone, -1, ids), np.where(gone, -np.inf, scores).astype(np.float32))

    return Case(found(), found(), queries, bank, rng.random(DOCUMENTS) < 0.7, own)


def by_definition(case, config):
    """One query after the other, one hit after the other."""
    table = []
    for row, query in enumerate(case.queries):
        taken, against, candidates = {int(case.own[row])}, [query], []
        for hits, count in ((case.by_image, config.by_image), (case.by_text, config.by_text)):
            kept = []
            for document, score in zip(hits.ids[row].tolist(), hits.scores[row], strict=True):
                if len(kept) == count or document < 0 or document in taken:
                    continue
                if not config.min_score <= score <= np.float32(config.max_score):
                    continue
                if config.whole_documents and not case.complete[document]:
                    continue
                vector = case.bank[document].astype(np.float64)
                if all(np.float32((vector * other).sum()) <= np.float32(config.max_similarity) for other in against):
                    kept.append((document, score))
                    taken.add(document)
                    against.append(case.bank[document])
            candidates += kept + [(-1, -np.inf)] * (count - len(kept))
        table.append(candidates)
    return table


configs = st.builds(
    SelectionConfig,
    max_score=st.floats(-0.5, 1),
    min_score=st.floats(-1, 0.5),
    max_similarity=st.floats(-1, 1.01),
    whole_documents=st.booleans(),
    by_image=st.integers(0, 3),
    by_text=st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(cases(), configs)
def test_every_rule_holds(case, config):
    taken = case.select(config)
    assert taken.ids.shape == (QUERIES, config.by_image + config.by_text)
    for row, (ids, scores) in enumerate(zip(taken.ids, taken.scores, strict=True)):
        there = ids >= 0
        assert np.all(scores[there] <= config.max_score) and np.all(scores[there] >= config.min_score)
        assert np.all(np.isneginf(scores[~there]))
        assert case.own[row] not in ids[there]
        assert len(set(ids[there])) == there.sum()
        assert not config.whole_documents or case.complete[ids[there]].all()
        shown = np.concatenate([case.queries[row : row + 1], case.bank[ids[there]]])
        similar = np.tril(shown @ shown.T, -1) + np.triu(np.full((len(shown), len(shown)), -2.0))
        assert np.all(similar <= config.max_similarity + 1e-6)
        for hits, part in ((case.by_image, slice(0, config.by_image)), (case.by_text, slice(config.by_image, None))):
            pairs = set(zip(hits.ids[row].tolist(), hits.scores[row].tolist(), strict=True))
            assert {*zip(ids[part][there[part]].tolist(), scores[part][there[part]].tolist(), strict=True)} <= pairs
            assert np.all(np.diff(scores[part][there[part]]) <= 0)


@settings(max_examples=150, deadline=None)
@given(cases(), configs)
def test_many_queries_at_once_take_what_each_takes_alone(case, config):
    taken = case.select(config)
    rows = [list(zip(*pair, strict=True)) for pair in zip(taken.ids.tolist(), taken.scores, strict=True)]
    assert rows == by_definition(case, config)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_nothing_is_left_out_without_a_reason(case):
    """With every rule open the best hits are taken, as long as they are no exact duplicates."""
    config = SelectionConfig(
        max_score=1.0, min_score=-1.0, max_similarity=1.5, whole_documents=False, by_image=3, by_text=0, searched=12
    )
    for row, ids in enumerate(case.select(config).ids):
        hits = [i for i in case.by_image.ids[row].tolist() if i not in (-1, case.own[row])]
        assert ids[ids >= 0].tolist() == hits[:3]


def test_defaults_are_those_of_the_paper():
    config = SelectionConfig()
    assert (config.max_score, config.query_dropout, config.by_image, config.by_text) == (0.9, 0.2, 2, 2)
    assert config.whole_documents


@pytest.mark.parametrize("score", [0.9, np.nextafter(np.float32(0.9), np.float32(1))])
def test_the_score_cap_is_sharp(score):
    bank = np.eye(3, dtype=np.float32)
    hits = Hits(np.array([[1]]), np.array([[score]], np.float32))
    nothing = Hits(np.array([[-1]]), np.array([[-np.inf]], np.float32))
    taken = select(hits, nothing, bank[:1], bank, np.ones(3, bool), np.array([0]), SelectionConfig(max_score=0.9))
    # fp32 0.9 is a little more than the double 0.9; what is compared is fp32.
    assert (taken.ids[0, 0] == 1) == (np.float32(score) <= np.float32(0.9))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_draws_are_different_candidates_with_gaps_in_front(seed, count):
    rng = np.random.default_rng(seed)
    candidates = np.where(rng.random((5, 4)) < 0.4, -1, np.arange(20).reshape(5, 4))
    drawn = draw(candidates, count, rng)
    assert drawn.shape == (5, count)
    for row, of in zip(drawn, candidates, strict=True):
        there = row[row >= 0]
        assert len(there) == min(count, (of >= 0).sum()) == len(set(there))
        assert set(there) <= set(of)
        assert np.all(row[: count - len(there)] == -1)


def test_every_candidate_and_every_order_is_drawn_equally_often():
    drawn = draw(np.tile(np.arange(4), (24_000, 1)), 3, np.random.default_rng(0))
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    np.testing.assert_allclose(counts, 1000, rtol=0.15)  # 4.7 standard deviations


def test_a_fifth_of_the_tokens_is_dropped():
    rng, ids = np.random.default_rng(0), np.arange(100)
    kept = [drop_tokens(ids, 0.2, rng) for _ in range(1000)]
    assert np.mean([len(k) for k in kept]) == pytest.approx(80, abs=0.4)  # five standard deviations
    assert all(np.all(np.diff(k) > 0) for k in kept)
    counts = np.bincount(np.concatenate(kept), minlength=100)
    assert counts.min() > 730 and counts.max() < 870  # 5.5 standard deviations
    assert len(drop_tokens(np.array([7]), 0.99, rng)) == 1
    assert len(drop_tokens(ids[:0], 0.2, rng)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by_image": 0, "by_text": 0}, "by_image 0 and by_text 0"),
        ({"by_text": 40}, "searched 32 is less"),
        ({"query_dropout": 1.0}, "query_dropout 1.0, expected"),
    ],
)
def test_impossible_rules_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**changes)
