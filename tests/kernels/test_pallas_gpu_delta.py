"""The gated delta rule's kernels on Hopper, in the interpreter that looks for races."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gated_delta_rule as op
from kernels import gated_linear_attention as fading
from kernels import reference
from kernels.pallas_gpu.inverse import inverses
from tests import support
from tests.kernels.compare import agree, both
from tests.kernels.hopper import INTERPRET, no_races  # noqa: F401
from tests.kernels.recurrent import (
    HOPPER,
    causal_mask,
    delta_problem,
    fused,
    joined,
    off_of_decays,
)

slow = pytest.mark.slow


def problem(length, *, heads=2, key=64, value=64):
    """In bfloat16, and with a beta of 0 now and then."""
    given = delta_problem(length, heads=heads, key=key, value=value, batch=1)
    given["beta"][:, ::9] = 0.0
    return given | {name: jnp.asarray(given[name], jnp.bfloat16) for name in "qkv"}


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [
        (70, "all", {"heads": 1}),
        pytest.param(130, "causal", {"key": 96, "value": 192, "heads": 1}, marks=slow),
        *HOPPER,
    ],
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, how):
    """With padding, segments and a state; widths of the kernels and others."""
    made = both(
        fused(op, "hopper", INTERPRET),
        joined(reference.gated_delta_rule),
        problem(length, **how),
        causal_mask(mask, length, batch=1),
    )
    agree(made, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize(("top", "off"), [(1.0, 5e-5), (1.99, 5e-3)])
def test_the_inverse_of_a_token_repeated_has_sixteen_bits(top, off):
    """Powers of the system grow as binomials; of 1.99 the inverse, too, magnifies what is off: in
    eight bits it would be half wrong.
    """
    k = jnp.ones((1, 128, 1, 64), jnp.bfloat16) / 8
    beta, still = jnp.full((1, 1, 128), top), jnp.zeros((1, 1, 128))
    segments = (jnp.arange(128) >= 96).astype(jnp.int32)[None]
    made = inverses(
        k, beta=beta, row=still, column=still, segments=segments, interpret=INTERPRET
    ).astype(jnp.float32)
    system = top * np.tril(np.ones((64, 64)), -1)
    for n, apart in enumerate((64, 32)):
        there = np.arange(64) // apart
        exact = np.linalg.inv(np.eye(64) + system * (there[:, None] == there))
        assert support.relative(made[0, 0, n].sum(0), exact) < off


@slow
@pytest.mark.parametrize("op", [op, fading])
def test_the_gradient_of_decays_is_as_good_after_many_tokens(op):
    given = problem(768, heads=1)
    if op is fading:
        del given["beta"]
    assert off_of_decays(op, given, "hopper", INTERPRET) < 4e-3
