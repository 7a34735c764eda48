"""The gated delta rule by its kernels on a simulated TPU, against its recurrence.

Outputs, last states and all gradients; the recurrence is in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gated_delta_rule as op
from kernels import reference
from tests import support
from tests.kernels import on_tpu
from tests.kernels.compare import agree, both
from tests.kernels.recurrent import causal_mask, joined, off_of_decays
from tests.kernels.recurrent import delta_problem as problem
from tests.kernels.simulated import pallas

pytestmark = pallas
slow = pytest.mark.slow
LENGTHS = (1, 7, 63, 100, 257)


def result(given, mask, **options):
    recurrence = joined(reference.gated_delta_rule)
    return both(
        on_tpu.fused(op), recurrence, given, causal_mask(mask, given["v"].shape[1]), **options
    )


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [(150, "all", {"heads": 3}), (7, "causal", {"key": 96, "value": 192})]
    + [
        pytest.param(length, mask, how, marks=slow)
        for how in ({}, {"key": 64, "value": 128}, {"key": 128, "value": 256, "batch": 1})
        for mask in ("causal", "all")
        for length in LENGTHS
        if mask == "causal" or how.get("batch") != 1  # masks are of four rows
    ],
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, how):
    """With padding, segments and states; widths of whole lanes and others."""
    agree(result(problem(length, **how), mask), forward=1e-5, backward=2e-5)


@slow
def test_bfloat16_is_a_rounding_away():
    agree(result(problem(150), "all", dtype=jnp.bfloat16), forward=5e-3, backward=1e-2)


def test_the_gradient_of_decays_is_as_good_after_many_tokens():
    given = problem(3000, batch=1, heads=1, key=64, value=64)
    assert off_of_decays(op, given, "tpu", True) < 5e-3


def test_beside_bfloat16_a_system_is_solved_to_sixteen_bits():
    from kernels.pallas_tpu.gated_delta import _precise

    x, y = (support.draw((64, 64), seed=seed) for seed in (0, 1))
    like = jnp.zeros((), jnp.bfloat16)
    assert support.relative(_precise(jnp.asarray(x), jnp.asarray(y), 1, like), x @ y) < 2e-5
    assert support.relative(_precise(jnp.asarray(x), jnp.asarray(y), 0, like), x.T @ y) < 2e-5


@slow
@pytest.mark.parametrize(("top", "forward"), [(1.0, 1e-5), (1.99, 1e-4)])
def test_a_token_repeated_three_hundred_times(top, forward):
    """Powers of the chunk's matrix grow as binomials; nothing may be computed from them."""
    given = problem(300, batch=1)
    given["k"][:] = given["k"][:1, :1]
    given["beta"][:], given["log_decay"][:] = top, 0.0
    agree(result(given, "none"), forward=forward, backward=2 * forward)


@slow
def test_the_simulator_of_tpu_finds_no_race_and_nothing_unwritten():
    on_tpu.no_race_and_nothing_unwritten(op, problem(140, batch=1))


@slow
def test_vmap_and_checkpoint():
    on_tpu.vmap_and_checkpoint(op, problem(20))


def test_without_decay_is_a_decay_of_one():
    given = jax.tree.map(jnp.asarray, problem(20, batch=1))
    still = given | {"log_decay": jnp.zeros_like(given["log_decay"])}
    loss = on_tpu.quick(on_tpu.loss(op))
    del given["log_decay"]
    np.testing.assert_array_equal(loss(given), loss(still))


def test_export_for_tpu():
    assert on_tpu.exported_kernels(op, problem(300, batch=2, heads=4, key=96, value=192)) == 3


@pytest.mark.parametrize(
    ("reason", "chip", "dtype", "key"),
    [
        ("v is float32 and the Hopper kernels take bfloat16", "hopper", jnp.float32, 32),
        ("keys have 192 channels a head, the Hopper kernels take 128", "hopper", jnp.bfloat16, 192),
        ("float16", "tpu", jnp.float16, 32),
        ("576 and 32 channels, the TPU kernels take 512", "tpu", jnp.float32, 576),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(reason, chip, dtype, key):
    on_tpu.refused(op, problem(9, batch=1, key=key), chip=chip, dtype=dtype, reason=reason)
