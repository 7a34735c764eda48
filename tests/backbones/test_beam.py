"""Beam search against greedy decoding, exhaustive search and a plain loop."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.backbones.beam import beam_search, spread
from efficient_attn.errors import UserError
from tests import support

VOCAB, END, START = 5, 1, 2
BATCH, LENGTH = 3, 4
TABLE = np.random.default_rng(0).standard_normal((BATCH, LENGTH, VOCAB, VOCAB, VOCAB)) * 1.5
"""Logits of the next token by row, position, last token and the one before it."""


def step(tokens, positions, state):
    """A model that knows its last two tokens: the older one only from the state."""
    row, before = state
    logits = jnp.asarray(TABLE, jnp.float32)[row, positions, tokens, before]
    return logits, (row, tokens)


def log_probability(row, sequence):
    total, before, last = 0.0, 0, START
    for position, token in enumerate(sequence):
        logits = TABLE[row, position, last, before]
        total += logits[token] - np.log(np.exp(logits).sum())
        before, last = last, token
    return total


def penalised(row, sequence, alpha):
    return log_probability(row, sequence) / ((5 + len(sequence)) / 6) ** alpha


@functools.cache
def _search(beam, alpha, max_len):
    def run(rows):
        state = spread((rows, jnp.zeros(BATCH, jnp.int32)), beam)
        return beam_search(
            step, state, batch=BATCH, beam=beam, max_len=max_len, start=START, end=END,
            never=(0, START), alpha=alpha,
        )  # fmt: skip

    return jax.jit(run, compiler_options=support.fast())


def search(beam, alpha=0.6, max_len=LENGTH):
    found = _search(beam, alpha, max_len)(jnp.arange(BATCH))
    return np.asarray(found.tokens), np.asarray(found.scores)


def sequences(max_len=LENGTH):
    """All that end within max_len tokens; padding and start are never written."""
    for length in range(max_len):
        for words in itertools.product((3, 4), repeat=length):
            yield (*words, END)


def cut(tokens):
    return tuple(tokens[: list(tokens).index(END) + 1].tolist())


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_of_all_sequences_is_exhaustive(alpha):
    everything = list(sequences())
    assert len(everything) == 15
    tokens, scores = search(15, alpha)
    for row in range(BATCH):
        ranked = sorted(everything, key=lambda s: -penalised(row, s, alpha))
        assert [cut(t) for t in tokens[row]] == ranked
        expected = [penalised(row, s, alpha) for s in ranked]
        np.testing.assert_allclose(scores[row], expected, rtol=1e-5)
    ends = np.cumsum(tokens == END, axis=-1) - (tokens == END)
    assert not tokens[ends > 0].any()


def test_the_length_penalty_changes_what_is_best():
    best = [{tuple(t.tolist()) for t in search(15, alpha)[0][:, 0]} for alpha in (0.0, 2.0)]
    assert best[0] != best[1]


def test_more_beams_than_sequences_leave_the_rest_empty():
    tokens, scores = search(20)
    assert np.isfinite(scores).sum(axis=1).tolist() == [15] * BATCH
    assert np.isneginf(scores[:, 15:]).all()
    assert not tokens[:, 15:].any()
    np.testing.assert_array_equal(tokens[:, :15], search(15)[0])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_of_one_is_greedy(alpha):
    tokens, scores = search(1, alpha)
    for row in range(BATCH):
        greedy, before, last = [], 0, START
        while END not in greedy:
            logits = TABLE[row, len(greedy), last, before].copy()
            logits[[0, START]] = -np.inf
            token = END if len(greedy) == LENGTH - 1 else int(logits.argmax())
            before, last = last, token
            greedy.append(token)
        assert cut(tokens[row, 0]) == tuple(greedy)
        np.testing.assert_allclose(scores[row, 0], penalised(row, greedy, alpha), rtol=1e-5)


def plain_beam(row, beam, alpha, max_len):
    """The rule of the docstring in lists."""
    alive, finished = [((), 0.0)], []
    for length in range(1, max_len + 1):
        grown = [
            ((*words, token), log_probability(row, (*words, token)))
            for words, _ in alive
            for token in ((END,) if length == max_len else (END, 3, 4))
        ]
        grown = sorted(grown, key=lambda one: -one[1])[: 2 * beam]
        finished += [words for words, _ in grown[:beam] if words[-1] == END]
        alive = [one for one in grown if one[0][-1] != END][:beam]
        if len(finished) >= beam:
            break
    return sorted(finished, key=lambda s: -penalised(row, s, alpha))[:beam]


@pytest.mark.parametrize("beam", [2, 3, 4])
def test_it_follows_the_rule_step_by_step(beam):
    tokens, scores = search(beam)
    for row in range(BATCH):
        expected = plain_beam(row, beam, 0.6, LENGTH)
        assert [cut(t) for t in tokens[row]] == expected
        values = [penalised(row, s, 0.6) for s in expected]
        np.testing.assert_allclose(scores[row], values, rtol=1e-5)


def test_rows_do_not_see_each_other():
    """Each row alone, beside copies of itself, finds what it finds in company."""
    tokens, _ = search(3)
    for row in range(BATCH):
        found = _search(3, 0.6, LENGTH)(jnp.full(BATCH, row))
        np.testing.assert_array_equal(found.tokens[0], tokens[row])


def test_it_stops_when_every_row_is_done():
    turns = []

    def eager(tokens, positions, state):
        jax.debug.callback(lambda t: turns.append(int(t)), positions[0])
        return jnp.full((len(tokens), VOCAB), -9.0).at[:, END].set(9.0), state

    beam_search(eager, (), batch=2, beam=1, max_len=50, start=START, end=END)
    jax.effects_barrier()
    assert turns == [0]


def test_spread_puts_a_row_beside_itself():
    out = spread({"a": jnp.arange(3), "b": jnp.arange(6).reshape(3, 2)}, 2)
    assert out["a"].tolist() == [0, 0, 1, 1, 2, 2]
    assert out["b"].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam must be positive, not 0"),
        ({"max_len": 0}, "max_len must be positive"),
        ({"alpha": -1.0}, "alpha must not be negative"),
        ({"never": (0, END)}, r"end=1 is among never=\(0, 1\), so no text could end"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        beam_search(
            step, (), batch=1, start=START, end=END, **({"beam": 1, "max_len": 1} | options)
        )


def test_the_penalty_is_that_of_the_paper():
    """Equation 14: ((5 + |Y|)^alpha) / ((5 + 1)^alpha)."""
    sequence = (3, 4, END)
    expected = log_probability(0, sequence) / (math.pow(5 + 3, 0.7) / math.pow(5 + 1, 0.7))
    assert penalised(0, sequence, 0.7) == pytest.approx(expected)
