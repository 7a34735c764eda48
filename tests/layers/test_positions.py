"""Sinusoids by their formula; rotations that depend on the distance alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.layers.positions import alibi_slopes, rotate, sinusoids, sinusoids_2d
from tests import support


@pytest.mark.parametrize("width", [8, 7, 2])
def test_sinusoids_are_those_of_the_paper(width):
    got = sinusoids(np.arange(50), width)
    pairs = -(-width // 2)
    for position in (0, 1, 49):
        angles = [position / 10_000 ** (2 * i / width) for i in range(pairs)]
        expected = np.concatenate([np.sin(angles), np.cos(angles)])[:width]
        np.testing.assert_allclose(got[position], expected, atol=1e-6)
    assert got.shape == (50, width) and got.dtype == np.float32


def test_two_dimensions_are_one_and_one():
    got = sinusoids_2d(3, 5, 16).reshape(3, 5, 16)
    np.testing.assert_array_equal(got[2, 4, :8], sinusoids(np.array(2), 8))
    np.testing.assert_array_equal(got[2, 4, 8:], sinusoids(np.array(4), 8))


def test_slopes_are_those_of_the_released_code():
    """Heads that are no power of 2: those of the power below, then half-steps in between."""
    powers = {8: range(1, 9), 12: [*range(1, 9), 0.5, 1.5, 2.5, 3.5], 2: [4, 8]}
    for heads, falls in powers.items():
        np.testing.assert_allclose(alibi_slopes(heads), [2.0**-f for f in falls], rtol=1e-6)


def logits(q, k, at_q, at_k):
    at = [jnp.full((1, 1), p) for p in (at_q, at_k)]
    return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))


def test_rotated_products_depend_on_the_distance_alone():
    q, k = (jnp.asarray(support.draw((1, 1, 1, 8), seed=s)) for s in (0, 1))
    for distance in (0, 1, 17):
        all_of_them = [logits(q, k, p + distance, p) for p in (0, 5, 300)]
        np.testing.assert_allclose(all_of_them, all_of_them[0], rtol=1e-3, atol=1e-4)
    assert abs(logits(q, k, 1, 0) - logits(q, k, 0, 1)) > 1e-2


def test_a_rotation_keeps_lengths_and_is_the_identity_at_zero():
    x = jnp.asarray(support.draw((2, 9, 3, 8), seed=0))
    turned = rotate(x, jnp.arange(9)[None])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_each_example_has_its_own_positions_and_halves_are_pairs():
    x = jnp.zeros((2, 1, 1, 4)).at[..., 0].set(1.0)
    turned = rotate(x, jnp.array([[0], [1]]))
    np.testing.assert_allclose(turned[1, 0, 0], [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
    np.testing.assert_array_equal(turned[0], x[0])


def test_half_precision_turns_by_float32_angles():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    at = jnp.array([[1000, 1001]])
    turned = rotate(x, at)
    assert turned.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.float32), at)
    np.testing.assert_allclose(turned.astype(jnp.float32), wide, atol=1e-2)
