"""How a token is chosen: the exact support of every option, ties, and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.backbones import Sampling
from efficient_attn.backbones.sampling import GREEDY, choose, narrow
from efficient_attn.errors import UserError

ODDS = np.array([0.05, 0.4, 0.1, 0.3, 0.15])  # by falling odds: 1, 3, 4, 2, 0
LOGITS = jnp.asarray(np.log(ODDS), jnp.float32)
EQUAL = jnp.zeros(5)


def left(logits, **options):
    """What is drawn from, with the tokens in their own order again."""
    falling, order = narrow(jnp.atleast_2d(logits), Sampling(**options))
    assert (np.diff(np.where(np.isneginf(falling), -1e9, falling)) <= 0).all()
    return np.take_along_axis(np.asarray(falling), np.argsort(order, axis=-1), axis=-1)


def support(logits):
    return np.flatnonzero(np.isfinite(logits)).tolist()


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, range(5))]
)
def test_top_k_keeps_k(k, kept):
    (out,) = left(LOGITS, top_k=k)
    assert support(out) == list(kept)
    np.testing.assert_array_equal(out[np.array(kept)], LOGITS[np.array(kept)])
    assert support(left(EQUAL, top_k=k)[0]) == list(range(min(k, 5)))  # of equals, the lower ids


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]),
        (0.94, [1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_top_p_keeps_the_fewest_that_have_p(p, kept):
    out = left(jnp.stack([LOGITS + 7.0, LOGITS]), top_p=p)  # logits are known up to a constant
    assert support(out[0]) == support(out[1]) == kept
    np.testing.assert_array_equal(out[1][np.array(kept)], LOGITS[np.array(kept)])
    count = min(5, int(np.ceil(5 * p - 1e-6)))
    assert support(left(EQUAL, top_p=p)[0]) == list(range(count))


def test_p_1_is_plain_sampling_even_of_what_rounds_to_nothing():
    logits = jnp.asarray([30.0, 0.0, -80.0])
    np.testing.assert_array_equal(left(logits)[0], logits)
    np.testing.assert_array_equal(left(logits, top_k=3)[0], logits)


def test_the_temperature_comes_first_then_k_then_p():
    """At temperature 1/2 the odds are squared; of the two that top k leaves, p takes its share."""
    squared = ODDS**2 / np.sum(ODDS**2)
    out = left(LOGITS, temperature=0.5)
    np.testing.assert_allclose(jax.nn.softmax(out)[0], squared, rtol=1e-5)
    share = 0.16 / (0.16 + 0.09)  # of token 1, after the temperature and top k
    for p, kept in ((share - 0.01, [1]), (share + 0.01, [1, 3])):
        both = left(LOGITS, temperature=0.5, top_k=2, top_p=p)
        assert support(both[0]) == kept


def test_draws_have_the_odds_of_what_is_left_and_never_the_padding():
    rows = jnp.tile(LOGITS, (20_000, 1))
    for sampling, kept in ((Sampling(), [1, 2, 3, 4]), (Sampling(top_k=3), [1, 3, 4])):
        drawn = np.asarray(choose(rows, jax.random.key(0), sampling))
        assert drawn.dtype == np.int32
        expected = np.where(np.isin(np.arange(5), kept), ODDS, 0)
        found = np.bincount(drawn, minlength=5) / len(drawn)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.015)  # 4 deviations
    high = rows[:100].at[:, 0].set(50.0)
    for sampling in (GREEDY, Sampling()):
        assert (np.asarray(choose(high, jax.random.key(0), sampling)) > 0).all()


def test_a_temperature_towards_0_is_greedy():
    rows = jax.random.normal(jax.random.key(1), (200, 7)).at[:, 0].set(-9.0)
    greedy = np.asarray(choose(rows, None, GREEDY))
    np.testing.assert_array_equal(greedy, np.argmax(rows, axis=-1))
    for tiny in (1e-4, 1e-30):
        drawn = choose(rows, jax.random.key(2), Sampling(temperature=tiny))
        np.testing.assert_array_equal(drawn, greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and not negative"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": 0.0, "top_k": 5}, "top_k=5 and .* are for drawing.*; give a temperature"),
        ({"temperature": 0.0, "top_p": 0.9}, "top_p=0.9 are for drawing"),
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
    ],
)
def test_what_cannot_be_asked_says_why(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
