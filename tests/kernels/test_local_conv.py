"""`kernels.local_conv` against its reference in float64, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, last_inputs, local_conv, local_conv_step, reference
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of


def inputs(length, *, taps=5, heads=2, width=8, dynamic=True):
    weights = (4, length, heads, taps) if dynamic else (1, 1, heads, taps)
    return arrays(0, x=(4, length, width), weights=weights)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("length", "mask"),
    [(63, mask) for mask in MASKS] + [(length, "all") for length in (1, 7, 100, 257)],
)
def test_output_and_gradients_are_the_references(length, mask, dynamic):
    given = inputs(length, dynamic=dynamic)
    agree(both(local_conv, reference.local_conv, given, mask_of(mask, length)))


@pytest.mark.parametrize("mask", ["segments", "all"])
@pytest.mark.parametrize(
    "shape", [{"taps": 1}, {"taps": 4}, {"taps": 31}, {"heads": 8}, {"heads": 1}], ids=str
)
def test_other_shapes(shape, mask):
    agree(both(local_conv, reference.local_conv, inputs(20, **shape), mask_of(mask, 20)))


def test_bfloat16_is_a_rounding_away():
    result = both(
        local_conv, reference.local_conv, inputs(63), mask_of("all", 63), dtype=jnp.bfloat16
    )
    agree(result, forward=1e-2, backward=2e-2)


def test_sums_of_bfloat16_are_float32():
    """All but one of 31 terms are below half a unit of the first one's last place."""
    taps = jnp.full((1, 1, 1, 31), 2.0**-10, jnp.bfloat16).at[..., 0].set(1.0)
    x = jnp.ones((1, 31, 1), jnp.bfloat16)
    out = local_conv(x, taps, mask=Mask(causal=True))[0, -1, 0]
    step, _ = local_conv_step(x[:, -1:], x[:, :-1], taps)
    assert out == step[0, 0, 0] == jnp.bfloat16(1 + 30 * 2.0**-10)


@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_numpys_correlation(taps, causal):
    given = inputs(12, taps=taps, heads=1, width=1, dynamic=False)
    x, w = given["x"][0, :, 0], given["weights"][0, 0, 0]
    before = taps - 1 if causal else (taps - 1) // 2
    padded = np.pad(x, (before, taps - 1 - before))
    expected = np.correlate(padded, w, mode="valid")
    out = local_conv(*map(jnp.asarray, given.values()), mask=Mask(causal=causal))
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 8])
def test_a_beginning_at_once_and_the_rest_step_by_step_is_the_whole(heads):
    """Beginnings of different lengths, shorter than the taps too; 8 heads are one per channel."""
    given = inputs(12, heads=heads, taps=5)
    x, weights = map(jnp.asarray, given.values())
    whole = np.asarray(local_conv(x, weights, mask=Mask(causal=True)))
    lengths = np.array([8, 1, 3, 0])
    keys = np.arange(8)[None] < lengths[:, None]
    state = last_inputs(
        jnp.where(keys[..., None], x[:, :8], 1e3), jnp.zeros((4, 4, 8)), keys=jnp.asarray(keys)
    )
    rows = np.arange(4)
    for t in range(4):
        at = lengths + t
        out, state = local_conv_step(x[rows, at][:, None], state, weights[rows, at][:, None])
        np.testing.assert_allclose(out[:, 0], whole[rows, at], rtol=1e-5, atol=1e-6)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        local_conv(jnp.zeros((1, 4, 8)), jnp.zeros((1, 1, 3, 3)))
