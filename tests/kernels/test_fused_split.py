"""A sequence cut into pieces that run beside each other gives what it gives whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, linear_attention_init, reference
from kernels.fused import linear as fused_linear
from kernels.fused import split
from kernels.target import use
from tests import support
from tests.kernels.compare import agree, arrays, both, mask_of
from tests.kernels.fused_linear import (
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
from tests.kernels.simulated import SIMULATOR, pallas

pytestmark = pallas


@pytest.fixture
def cut(monkeypatch):
    """Sets how many pieces there are."""
    return lambda count: monkeypatch.setattr(fused_linear, "pieces", lambda *_: count)


@pytest.mark.parametrize(
    ("count", "mask", "how"),
    [
        (2, "all", {"dim": 32, "scale": 3.0}),  # three chunks: a fourth is filled up
        pytest.param(3, "causal", {"dim": 64}, marks=slow),
        pytest.param(3, "all", {"dim": 128, "scale": 1.0}, marks=slow),
        pytest.param(5, "all", {"dim": 32, "scale": 1.0}, marks=slow),
    ],
)
def test_linear(count, mask, how, cut):
    cut(count)
    length = 257 if count < 5 else 600
    given = features(length, **how)
    agree(both(linear, reference.linear_attention, given, mask_of(mask, length)))


@pytest.mark.parametrize(("groups", "dtype"), [(1, None), (2, jnp.bfloat16)])
@slow
def test_favor(groups, dtype, cut):
    cut(2)
    given, weight = queries(257, dim=32, groups=groups), rows(64, 32)
    result = both(favor, favor_reference, given, mask_of("all", 257), weight=weight, dtype=dtype)
    agree(result, **({} if dtype is None else {"forward": 5e-3, "backward": 1e-2}))


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(2, None), pytest.param(3, None, marks=slow), pytest.param(2, jnp.bfloat16, marks=slow)],
)
def test_gated(count, dtype, cut):
    """A state before the first piece, what the last one leaves, and the gradients of both."""
    cut(count)
    given = decaying(600, heads=2)
    given["log_decay"] = given["log_decay"].clip(-10.0) / 400  # e^-1 of a state is left by a chunk
    given["initial_state"] = arrays(3, s=(4, 2, 32, 32))["s"]
    limits = {"forward": 1e-4, "backward": 2e-4}
    if dtype is not None:
        given["log_decay"] = np.asarray(jnp.asarray(given["log_decay"], dtype), np.float32)
        limits = {"forward": 5e-3, "backward": 1e-2}
    whole = together(reference.gated_linear_attention)
    result = both(together(gated), whole, given, mask_of("all", 600), dtype=dtype)
    agree(result, **limits)


def test_bfloat16_is_a_rounding_away(cut):
    cut(3)
    given = features(257, batch=4, dim=64, scale=1.0)
    mask = mask_of("all", 257)
    agree(
        both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16),
        forward=5e-3,
        backward=1e-2,
    )


@slow
def test_states_go_in_and_out_and_gradients_through_them(cut):
    """Log scales as far apart as e^60, one segment going over from the first part to the second."""
    cut(2)
    given = jax.tree.map(jnp.asarray, features(420, batch=1, dim=16, scale=10.0))
    segments = jnp.asarray(np.arange(420) // 130)[None]

    def total(given, run):
        state, read = linear_attention_init(1, 2, 16, 16), 0.0
        for at in (slice(0, 200), slice(200, 420)):
            mask = Mask(causal=True, segments=segments[:, at])
            part = {name: x[:, at] for name, x in given.items()}
            out, state = run(**part, state=state, mask=mask)
            read += jnp.sum(jnp.sin(out))
        return read + jnp.sum(jnp.sin(state.sums)) + jnp.sum(state.top)

    got, expected = (
        quick(jax.value_and_grad(functools.partial(total, run=f)))(given)
        for f in (continued, by_xla)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert support.relative(a, b) < 5e-5


@slow
def test_the_simulator_of_tpu_finds_no_race(cut):
    cut(2)
    given = jax.tree.map(jnp.asarray, queries(140, batch=1))
    weight = rows(24, 64)
    mask = Mask(causal=True, segments=jnp.asarray(support.ragged_segments(140)[:1]))
    call = lambda given, how: jnp.sum(  # noqa: E731
        jnp.sin(favor(**given, weight=weight, mask=mask, interpret=how))
    )
    made = [quick(jax.value_and_grad(functools.partial(call, how=h)))(given) for h in
            (SIMULATOR, True)]  # fmt: skip
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@slow
def test_linear_on_hopper(cut, capfd):
    """In the interpreter that looks for races, with grouped heads."""
    if tuple(int(n) for n in jax.__version__.split(".")[:3]) < (0, 11, 2):
        pytest.skip("GPU kernels are interpreted from jax 0.11.2 on")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    cut(2)
    shape = (1, 180, 2, 64)
    given = arrays(q=shape, k=(1, 180, 1, 64), v=shape, log_scale=(1, 180, 1))
    given |= {name: np.abs(given[name]) + 0.1 for name in "qk"}
    mask = mask_of("all", 180)
    mask |= {name: mask[name][:1] for name in ("keys", "segments")}

    def op(q, k, v, *, log_scale, mask=Mask()):  # noqa: B008
        how = {"features": None, "log_scale": log_scale, "mask": mask, "chunk": 128}
        with use("hopper", plgpu.InterpretGPUParams(detect_races=True)):
            return fused_linear.linear(q, k, v, **how)

    def exact(q, k, v, *, log_scale, mask):
        k, log_scale = (jnp.repeat(x, 2, axis=2) for x in (k, log_scale))
        return reference.linear_attention(q, k, v, log_scale=log_scale, mask=mask)

    agree(both(op, exact, given, mask, dtype=jnp.bfloat16), forward=5e-3, backward=1e-2)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_a_cut_lowers_for_tpu(cut):
    cut(4)
    x = jax.ShapeDtypeStruct((1, 1000, 2, 128), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((1, 1000, 2), jnp.float32)

    def loss(q, k, v, log_decay):
        out, state = gated(q, k, v, log_decay, interpret=None)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

    made = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2, 3))), platforms=["tpu"])(
        x, x, x, numbers
    )
    assert made.mlir_module().count("@tpu_custom_call") == 4  # sums of both sides, and both passes


@pytest.mark.parametrize(
    ("cores", "batch", "heads", "dim", "length", "count"),
    [
        (132, 1, 132, 128, 16384, 1),  # as many heads as SMs
        (132, 4, 24, 128, 16384, 1),  # three quarters: half as much again is not won back
        (132, 1, 16, 128, 16384, 8),
        (132, 1, 32, 64, 16384, 8),  # two heads to an SM
        (132, 1, 1, 128, 65536, 128),
        (132, 1, 1, 128, 64, 1),
        (132, 1, 1, 128, 8128, 127),  # 127 chunks divide by no less, and are not filled up
        (132, 1, 16, 128, 8100, 8),  # these are, in any case
        (2, 1, 1, 128, 16384, 2),
        (1, 1, 1, 128, 16384, 1),
    ],
)
def test_pieces(cores, batch, heads, dim, length, count, monkeypatch):
    monkeypatch.setattr(split, "cores", lambda: cores)
    assert split.pieces(batch, heads, dim, length, 64) == count


def test_cores_of_a_named_chip():
    for chip, count in (("hopper", 132), ("tpu", 1), ("cpu", 1)):
        with use(chip):
            assert split.cores() == count
