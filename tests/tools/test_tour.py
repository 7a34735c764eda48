"""The tour's pictures show what they say: matrices by one-hot values, patterns by gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.errors import UserError
from efficient_attn.tools import maps, tour


def drawn(length=12, heads=2, dim=8):
    return jax.random.normal(jax.random.key(1), (2, length, heads, dim))


def softmax(q, k, seen=True):
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    numbers = np.where(seen, np.exp(logits), 0)
    return numbers / numbers.sum(-1, keepdims=True)


def test_the_matrix_of_softmax_is_its_formula():
    q, k = drawn()
    np.testing.assert_allclose(maps.weights("softmax", q, k), softmax(q, k), atol=1e-6)
    past = np.tril(np.ones((12, 12), bool))
    found = maps.weights("softmax", q, k, causal=True)
    np.testing.assert_allclose(found, softmax(q, k, past), atol=1e-6)


def test_only_cores_have_a_matrix():
    with pytest.raises(UserError, match="lsra is no core"):
        maps.weights("lsra", *drawn())


def test_the_pattern_of_a_window_is_the_window():
    t = np.arange(12)
    found = maps.influence("local(window=4)", 12) > 0
    np.testing.assert_array_equal(found, np.abs(t[:, None] - t[None]) <= 2)


def test_gradients_are_those_of_the_function_and_0_where_there_are_none():
    shift = lambda x: 3 * jnp.roll(x, 1, axis=0).at[0].set(0)  # noqa: E731
    found = maps.gradients(shift, jnp.ones((4, 5)))
    u = np.random.default_rng(0).standard_normal(5)
    np.testing.assert_allclose(found, 3 * np.linalg.norm(u) * np.eye(4, k=-1), rtol=1e-6)
    halves = lambda x: jnp.concatenate([x[:, :2], jnp.roll(x[:, 2:], 1, axis=0)], 1)  # noqa: E731
    found = maps.gradients(halves, jnp.ones((4, 5)), channels=[0, 1])
    np.testing.assert_array_equal(found > 0, np.eye(4, dtype=bool))


def test_shades_tell_0_from_little():
    shades = tour.shade(np.array([[0.0, 1e-9, 1e-3, 1.0]]))
    np.testing.assert_allclose(shades, [[0, 0.2, 0.2, 1.0]])
