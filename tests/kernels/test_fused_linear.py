"""Fused linear attention on a simulated TPU, against the references in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, linear_attention_init, reference
from kernels.favor_attention import causal_favor_attention
from kernels.fused import linear as fused_linear
from kernels.target import use
from tests import support
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of
from tests.kernels.fused_linear import (
    CAUSAL,
    by_xla,
    continued,
    decaying,
    favor,
    favor_reference,
    features,
    gated,
    linear,
    queries,
    quick,
    rows,
    slow,
    together,
)
from tests.kernels.simulated import pallas

pytestmark = pallas


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [
        (257, "all", {"scale": 1.0}),
        pytest.param(100, "causal", {"dim": 64}, marks=slow),
        (63, "padding", {"keys": 300, "dim": 128, "scale": 3.0}),
        (100, "segments", {"scale": 3.0}),
    ]
    + [
        pytest.param(length, mask, {"dim": dim, "scale": scale}, marks=slow)
        for dim, scale in ((32, 1.0), (64, None), (128, 1.0))
        for mask in MASKS
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_linear(length, mask, how):
    given = features(length, **how)
    agree(both(linear, reference.linear_attention, given, mask_of(mask, how.get("keys", length))))


@pytest.mark.parametrize(
    ("length", "mask", "rank", "how"),
    [
        (257, "all", 100, {"dim": 32}),
        (63, "padding", 256, {"keys": 200}),
        (100, "segments", 20, {"dim": 32, "groups": 1}),
    ]
    + [
        pytest.param(length, mask, rank, {"dim": dim, "groups": 1}, marks=slow)
        for rank, dim in ((20, 32), (256, 64), (64, 128))
        for mask in MASKS
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_favor(length, mask, rank, how):
    given = queries(length, **how)
    options = {"weight": rows(rank, given["q"].shape[3])}
    said = mask_of(mask, how.get("keys", length))
    agree(both(favor, favor_reference, given, said, **options))


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [(257, "all", {"heads": 4})]
    + [
        pytest.param(length, mask, how, marks=slow)
        for how in ({"dim": 32}, {"dim": 64, "groups": 2}, {"dim": 128})
        for mask in ("causal", "all")
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_gated(length, mask, how):
    """Decays of -30 and less leave 1e-13, not nothing, and sums of them 1e-4 of precision."""
    given = decaying(length, **how)
    state = arrays(3, s=(4, *(given["v"].shape[2],), *(given["v"].shape[3],) * 2))["s"]
    given["initial_state"] = state
    result = both(
        together(gated), together(reference.gated_linear_attention), given, mask_of(mask, length)
    )
    agree(result, forward=1e-4, backward=2e-4)


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=slow)])
def test_scales_of_e_to_the_50_leave_every_row_its_own_precision(sign):
    """Chunks below and above: what the first chunk holds is e^-100 of what the next one does."""
    given = features(257)
    steps = sign * np.where(np.arange(257) % 200 < 100, -50.0, 50.0)
    noise = arrays(3, s=(4, 257, 2))["s"]
    given["log_scale"] = (steps[None, :, None] + noise).astype(np.float32)
    mask = mask_of("all", 257)
    result = both(linear, reference.linear_attention, given, mask)
    agree(result, forward=2e-5, backward=5e-5)


def test_no_later_key_has_a_say():
    """Not by a rounding: rows before it are equal bit by bit, whatever is changed."""
    given = features(150, batch=1, scale=50.0)
    other = {name: x.copy() for name, x in given.items()}
    other["log_scale"][:, 77:] += 30.0
    other["v"][:, 77:] *= -3.0
    other["k"][:, 77:] += 1.0
    run = quick(lambda x: linear(**x, mask=CAUSAL))
    here, there = (np.asarray(run(x)) for x in (given, other))
    np.testing.assert_array_equal(here[:, :77], there[:, :77])
    assert (here[:, 77] != there[:, 77]).any()
    raw, weight = queries(150, batch=1), rows(40, 64)
    other = {name: np.concatenate([x[:, :77], 2 * x[:, 77:]], 1) for name, x in raw.items()}
    run = quick(lambda x: favor(**x, weight=weight, mask=CAUSAL))
    here, there = (np.asarray(run(x)) for x in (raw, other))
    np.testing.assert_array_equal(here[:, :77], there[:, :77])
    assert (here[:, 77] != there[:, 77]).any()


@pytest.mark.parametrize(
    "op",
    [pytest.param("linear", marks=slow), "linear, heads beside each other", "favor", "gated"],
)
def test_bfloat16_is_a_rounding_away(op):
    if op == "gated":
        given = decaying(150, heads=2, dim=64)
        given["log_decay"] = np.asarray(jnp.asarray(given["log_decay"], jnp.bfloat16), np.float32)
        call = lambda log_decay, **x: gated(log_decay=log_decay.astype(jnp.float32), **x)[0]  # noqa: E731
        expected = lambda **x: reference.gated_linear_attention(**x)[0]  # noqa: E731
        result = both(call, expected, given, mask_of("all", 150), dtype=jnp.bfloat16)
    elif op == "linear":
        given, mask = features(150, dim=64, scale=1.0), mask_of("all", 150)
        result = both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16)
    elif op == "linear, heads beside each other":
        given, mask = features(257, batch=4, heads=4, dim=128), mask_of("causal", 257)
        result = both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16)
    else:
        given, options = queries(150), {"weight": rows(256, 64)}
        mask = mask_of("all", 150)
        result = both(favor, favor_reference, given, mask, dtype=jnp.bfloat16, **options)
    agree(result, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_what_all_keys_have_in_common_takes_no_precision_from_a_querys_gradient(causal):
    """It cancels there; r of a rounded `out` would leave 8e-3 of it, where causal 1.3e-2."""
    given = {name: np.exp(0.3 * np.log(x)) if name in "qk" else x
             for name, x in features(257, batch=1, heads=4, dim=128).items()}  # fmt: skip
    mask = {"keys": None, "segments": None, "causal": causal}
    result = both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16)
    assert support.relative(result.grads["q"], result.expected_grads["q"]) < 7e-3


@pytest.mark.parametrize("cut", [100, pytest.param(128, marks=slow), pytest.param(1, marks=slow)])
def test_a_sequence_cut_in_two_gives_what_it_gives_whole(cut):
    """With the XLA path's states, which go over from one to the other."""
    given = jax.tree.map(jnp.asarray, features(200, batch=2, scale=20.0))
    keys = jnp.asarray(np.random.default_rng(0).random((2, 200)) < 0.7).at[:, :3].set(False)
    segments = jnp.asarray(np.arange(200) // 90)[None].repeat(2, 0)
    empty = linear_attention_init(2, 2, 32, 32)

    def part(at, state, run=continued):
        mask = Mask(causal=True, keys=keys[:, at], segments=segments[:, at])
        q, k, v, scale = (given[x][:, at] for x in ("q", "k", "v", "log_scale"))
        call = lambda q, k, v, state: run(q, k, v, state, log_scale=scale, mask=mask)  # noqa: E731
        return quick(call)(q, k, v, state)

    whole, last = part(slice(0, 200), empty, by_xla)
    for first in (continued, by_xla):
        begun, state = part(slice(0, cut), empty, first)
        rest, end = part(slice(cut, 200), state)
        np.testing.assert_allclose(jnp.concatenate([begun, rest], 1), whole, rtol=1e-4, atol=1e-5)
        size = float(jnp.max(jnp.abs(last.sums)))
        np.testing.assert_allclose(end.sums, last.sums, rtol=1e-4, atol=1e-5 * size)
        np.testing.assert_allclose(end.top, last.top)


@slow
@pytest.mark.parametrize("feature_map", ["positive", "hyperbolic"])
def test_favor_goes_on_from_the_xla_paths_state_and_back(feature_map):
    given, weight = jax.tree.map(jnp.asarray, queries(140, batch=1)), jnp.asarray(rows(24, 64))
    count = 24 if feature_map == "positive" else 48
    empty = linear_attention_init(1, 2, count, 64)

    def run(backend):
        how = {"feature_map": feature_map, "backend": backend}
        return quick(
            lambda x, state: causal_favor_attention(**x, projection=weight, state=state, **how)
        )

    with use("tpu", True):
        pallas, xla = run("pallas"), run("xla")
        out, state = pallas(given, empty)
        expected, left = xla(given, empty)
        held = [x.sums * jnp.exp(x.top)[..., None, None] for x in (state, left)]
        np.testing.assert_allclose(*held, rtol=1e-4, atol=1e-5 * float(jnp.abs(held[1]).max()))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        for first in (state, left):
            for second in (pallas, xla):
                again, wide = second(given, first)[0], xla(given, left)[0]
                np.testing.assert_allclose(again, wide, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_the_state_into_the_first_part():
    given = jax.tree.map(jnp.asarray, features(140, batch=1, dim=16, scale=1.0))
    empty = linear_attention_init(1, 2, 16, 16)

    def total(given, run):
        at = lambda x, cut: {name: y[:, cut] for name, y in x.items()}  # noqa: E731
        first, state = run(**at(given, slice(0, 60)), state=empty)
        rest, left = run(**at(given, slice(60, 140)), state=state)
        read = jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sin(rest))
        return read + jnp.sum(jnp.sin(left.sums / 1e3))

    got, expected = (
        quick(jax.grad(functools.partial(total, run=f)))(given) for f in (continued, by_xla)
    )
    for name in expected:
        assert support.relative(got[name], expected[name]) < 2e-5, name


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients():
    given = features(7, scale=1.0)
    for name in ("padding", "all"):
        result = both(linear, reference.linear_attention, given, mask_of(name, 7))
        np.testing.assert_array_equal(result.out[3], 0)
        for grad in result.grads.values():
            np.testing.assert_array_equal(grad[3], 0)


def test_what_is_not_a_number_is_not_hidden_unless_the_mask_hides_it():
    ones = jnp.ones((1, 3, 1, 128))
    bad, keys = ones.at[0, 1].set(jnp.nan), jnp.asarray([[True, False, True]])
    for causal in (False, True):
        run = quick(lambda q, k, v, keys: linear(q, k, v, mask=Mask(causal=causal, keys=keys)))  # noqa: B023
        assert jnp.isnan(run(bad, ones, ones, keys | True)[0, 1]).all()
        assert jnp.isnan(run(ones, bad, ones, keys | True)[0, 1:]).all()
        assert jnp.isfinite(run(ones, bad, bad, keys)).all()


def test_features_of_python_are_made_before_the_kernels_run():
    given = jax.tree.map(jnp.asarray, queries(60, batch=1, dim=32))
    phi = lambda x, at: (jnp.exp(x), jnp.sin(at)[:, :, None] + x[..., 0])  # noqa: E731
    how = {"features": phi, "log_scale": None, "mask": CAUSAL, "chunk": 128}
    with use("tpu", True):
        assert fused_linear.refuse_linear(**given, **how) is None
        out = quick(lambda x: fused_linear.linear(**x, **how))(given)
    (q, _), (k, scale) = (phi(given[x], jnp.arange(60)[None]) for x in "qk")
    expected = reference.linear_attention(q, k, given["v"], log_scale=scale, mask=CAUSAL)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
