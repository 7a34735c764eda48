"""Gated linear attention with a decay per channel on a simulated TPU, against its recurrence.

Outputs, last states and all gradients; the recurrence is in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, gated_linear_attention, reference
from kernels.target import use
from tests import support
from tests.kernels.compare import agree, arrays, both
from tests.kernels.recurrent import causal_mask, joined
from tests.kernels.simulated import SIMULATOR, pallas

pytestmark = pallas
slow = pytest.mark.slow
LENGTHS = (1, 7, 63, 100, 257)


def fused(*args, interpret=True, **options):
    """The op by its kernels, outputs and state in one array."""
    with use("tpu", interpret):
        return joined(gated_linear_attention)(*args, backend="pallas", **options)


def problem(length, *, batch=4, heads=2, groups=None, key=32, value=32):
    """Log decays from -1e-3 to -10, and now and then -1e7 and -inf."""
    like = (batch, length, groups or heads, key)
    given = arrays(0, q=like, k=like, v=(batch, length, heads, value))
    given["q"] /= key**0.5
    given["k"] /= np.linalg.norm(given["k"], axis=-1, keepdims=True)
    decay = -(10.0 ** np.random.default_rng(1).uniform(-3, 1, (batch, length, heads, key)))
    decay[:, 11::29], decay[:, 13::31, :, ::3] = -1e7, -np.inf
    given["log_decay"] = decay.astype(np.float32)
    return given | arrays(3, initial_state=(batch, heads, key, value))


def result(given, mask, **options):
    recurrence = joined(reference.gated_linear_attention)
    return both(fused, recurrence, given, causal_mask(mask, given["v"].shape[1]), **options)


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [
        (150, "all", {"groups": 1}),
        pytest.param(100, "all", {"heads": 4, "groups": 2, "key": 128}, marks=slow),
        pytest.param(100, "causal", {"batch": 1, "key": 128, "value": 256}, marks=slow),
    ]
    + [
        pytest.param(length, mask, how, marks=slow)
        for how in ({}, {"key": 64, "value": 128}, {"key": 128, "value": 128})
        for mask in ("causal", "all")
        for length in LENGTHS
    ],
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, how):
    """With grouped heads, padding, segments and states, of which some fade at once."""
    agree(result(problem(length, **how), mask), forward=1e-5, backward=2e-5)


@slow
def test_bfloat16_is_a_rounding_away():
    agree(result(problem(150), "all", dtype=jnp.bfloat16), forward=5e-3, backward=1e-2)


@slow
@pytest.mark.parametrize("cut", [-1e7, -np.inf])
def test_one_token_that_forgets_everything_leaves_the_others_precise(cut):
    given = problem(40, batch=1)
    given["log_decay"] = np.full_like(given["log_decay"], -0.1)
    given["log_decay"][:, 20] = cut
    made = result(given, "none")
    agree(made, forward=1e-6, backward=1e-6)
    np.testing.assert_array_equal(made.grads["log_decay"][:, 20], 0)


def loss(given, interpret=True):
    out = fused(**given, mask=Mask(causal=True), interpret=interpret)
    return jnp.sum(jnp.sin(out))


def run(interpret=True):
    """The op's loss and its gradient by all that it is given."""
    return jax.value_and_grad(functools.partial(loss, interpret=interpret))


def quick(function):
    return jax.jit(function, compiler_options=support.fast())


def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@slow
def test_the_simulator_of_tpu_finds_no_race_and_nothing_unwritten():
    given = jax.tree.map(jnp.asarray, problem(140, batch=1))
    same(quick(run(SIMULATOR))(given), quick(run())(given))


@slow
def test_vmap_and_checkpoint():
    given = jax.tree.map(jnp.asarray, problem(20))

    def mapped(given):
        apart = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
        return jnp.sum(jax.vmap(jax.checkpoint(loss))(apart))

    same(quick(jax.value_and_grad(mapped))(given), quick(run())(given))


def test_export_for_tpu():
    given = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if name in "qkv" else jnp.float32)
        for name, x in problem(300, batch=2, heads=4, key=64, value=64).items()
    }
    made = jax.export.export(jax.jit(run(None)), platforms=["tpu"])(given)
    assert made.mlir_module().count("tpu_custom_call") == 3


@pytest.mark.parametrize(
    ("reason", "chip", "dtype", "key"),
    [
        ("for TPUs, not for hopper", "hopper", jnp.float32, 32),
        ("float16", "tpu", jnp.float16, 32),
        ("blocks of 128 to 256 lanes", "tpu", jnp.float32, 384),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(reason, chip, dtype, key):
    given = {name: jnp.asarray(x, dtype) for name, x in problem(9, batch=1, key=key).items()}
    with use(chip), pytest.raises(NotImplementedError, match=reason):
        gated_linear_attention(**given, backend="pallas")
