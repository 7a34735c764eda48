"""Gated linear attention with a decay per channel on a simulated TPU, against its recurrence.

Outputs, last states and all gradients; the recurrence is in float64.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gated_linear_attention as op
from kernels import reference
from tests.kernels import on_tpu
from tests.kernels.compare import agree, both
from tests.kernels.recurrent import causal_mask, channel_problem, joined
from tests.kernels.simulated import pallas

pytestmark = pallas
slow = pytest.mark.slow
LENGTHS = (1, 7, 63, 100, 257)


def result(given, mask, **options):
    recurrence = joined(reference.gated_linear_attention)
    return both(
        on_tpu.fused(op), recurrence, given, causal_mask(mask, given["v"].shape[1]), **options
    )


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
    agree(result(channel_problem(length, **how), mask), forward=1e-5, backward=2e-5)


@slow
def test_bfloat16_is_a_rounding_away():
    agree(result(channel_problem(150), "all", dtype=jnp.bfloat16), forward=5e-3, backward=1e-2)


@slow
@pytest.mark.parametrize("cut", [-1e7, -np.inf])
def test_one_token_that_forgets_everything_leaves_the_others_precise(cut):
    given = channel_problem(40, batch=1)
    given["log_decay"] = np.full_like(given["log_decay"], -0.1)
    given["log_decay"][:, 20] = cut
    made = result(given, "none")
    agree(made, forward=1e-6, backward=1e-6)
    np.testing.assert_array_equal(made.grads["log_decay"][:, 20], 0)


@slow
def test_the_simulator_of_tpu_finds_no_race_and_nothing_unwritten():
    on_tpu.no_race_and_nothing_unwritten(op, channel_problem(140, batch=1))


@slow
def test_vmap_and_checkpoint():
    on_tpu.vmap_and_checkpoint(op, channel_problem(20))


def test_export_for_tpu():
    assert (
        on_tpu.exported_kernels(op, channel_problem(300, batch=2, heads=4, key=64, value=64)) == 3
    )


@pytest.mark.parametrize(
    ("reason", "chip", "dtype", "key"),
    [
        ("v is float32 and the Hopper kernels take bfloat16", "hopper", jnp.float32, 32),
        ("256 and 32 channels a head; where each fades", "hopper", jnp.bfloat16, 256),
        ("float16", "tpu", jnp.float16, 32),
        ("blocks of 128 to 256 lanes", "tpu", jnp.float32, 384),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(reason, chip, dtype, key):
    on_tpu.refused(op, channel_problem(9, batch=1, key=key), chip=chip, dtype=dtype, reason=reason)
