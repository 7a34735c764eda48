"""What is special to long-short range attention: two halves, and kernels of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.lsra import DynamicKernel, LocalBranch, Lsra
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support


def mixer(*, layer=0, heads=4, width=support.WIDTH, **options):
    site = support.site(layer=layer, heads=heads, width=width)
    return Lsra(Lsra.Config(**options), site, rngs=nnx.Rngs(0), shared={})


def local(**options):
    return LocalBranch(Lsra.Config(**options), support.site(), rngs=nnx.Rngs(0))


def x_of(length=9, width=support.WIDTH):
    return jnp.asarray(support.draw((2, length, width), seed=0))


@pytest.mark.parametrize(
    ("kernel", "expected"), [(5, [5, 5, 5]), ((3, 7), [3, 7, 7]), ((3, 7, 15, 31), [3, 7, 15])]
)
def test_each_layer_takes_its_kernel_and_deeper_ones_the_last(kernel, expected):
    assert [mixer(layer=i, kernel=kernel).local.taps for i in range(3)] == expected


def test_the_halves_do_not_know_each_other():
    x, made = x_of(), mixer(kernel=3)
    half = support.WIDTH // 2
    for mine, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        before = made(x, mask=Mask(), shared={})
        after = made(x.at[..., other].multiply(-3.0), mask=Mask(), shared={})
        np.testing.assert_array_equal(before[..., mine], after[..., mine])
        assert np.abs(before[..., other] - after[..., other]).max() > 1e-2


def test_a_dynamic_kernel_that_ignores_its_input_is_a_lightweight_one():
    light, dynamic = local(conv="lightweight", kernel=5), local(conv="dynamic", kernel=5)
    for name in ("enter", "leave"):
        getattr(dynamic, name).kernel[...] = getattr(light, name).kernel[...]
    x = x_of()
    # predicts the same taps whatever it reads: one input is constant, the others have weight 0
    taps = light.kernel.weight[...]
    dynamic.enter.kernel[...] = dynamic.enter.kernel[...].at[:, 0].set(0.0)
    light.enter.kernel[...] = light.enter.kernel[...].at[:, 0].set(0.0)
    for branch in (light, dynamic):
        branch.enter.bias[...] = branch.enter.bias[...].at[0].set(2.0)
        branch.enter.kernel[...] = branch.enter.kernel[...].at[:, support.WIDTH].set(0.0)
    constant = 2.0 * jax.nn.sigmoid(0.0)
    predict = dynamic.kernel.predict
    predict.kernel[...] = jnp.zeros_like(predict.kernel[...]).at[0].set(taps.ravel() / constant)
    for mask in (Mask(), Mask(causal=True)):
        got = dynamic(x, mask=mask, rngs=None)
        np.testing.assert_allclose(got, light(x, mask=mask, rngs=None), rtol=1e-5, atol=1e-6)


def test_taps_are_shares():
    branch = local(kernel=7)
    x = x_of()
    weights = branch._weights(branch._enter(x))
    assert weights.shape == (2, 9, 4, 7)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_dynamic_kernels_are_of_each_positions_own_input():
    made = DynamicKernel(support.site(), 3, rngs=nnx.Rngs(0))
    x = x_of()
    before, after = made(x), made(x.at[:, 4].add(1.0))
    np.testing.assert_array_equal(np.delete(before, 4, axis=1), np.delete(after, 4, axis=1))


def test_taps_are_dropped_in_training_alone():
    made, x = mixer(kernel=7, weight_dropout=0.5), x_of()
    half = support.WIDTH // 2
    quiet = [made(x, mask=Mask(), shared={}) for _ in range(2)]
    np.testing.assert_array_equal(*quiet)
    noisy = [made(x, mask=Mask(), rngs=nnx.Rngs(dropout=i), shared={}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    np.testing.assert_array_equal(noisy[0][..., :half], quiet[0][..., :half])
    for other in (noisy[2], quiet[0]):
        assert np.abs(noisy[0] - other)[..., half:].max() > 1e-2
    never = mixer(kernel=7, weight_dropout=0.0)
    same = never(x, mask=Mask(), rngs=nnx.Rngs(dropout=0), shared={})
    np.testing.assert_array_equal(same, never(x, mask=Mask(), shared={}))


def test_one_tap_is_a_projection_of_each_position():
    branch, x = local(kernel=1, gate="linear"), x_of()
    np.testing.assert_allclose(
        branch(x, mask=Mask(), rngs=None), branch.leave(branch.enter(x)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("width", "heads"), [(8, 8), (6, 2), (9, 3)])
def test_half_the_width_holds_the_heads(width, heads):
    with pytest.raises(UserError, match=f"heads={heads} does not divide half of width={width}"):
        mixer(width=width, heads=heads)
