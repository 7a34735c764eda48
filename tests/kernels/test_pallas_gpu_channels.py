"""Linear attention that fades by channel, on Hopper, in the interpreter that looks for races."""

import jax
import jax.numpy as jnp
import pytest

from kernels import gated_linear_attention as op
from kernels import reference
from kernels.fused import split
from tests.kernels.compare import agree, both
from tests.kernels.hopper import INTERPRET, no_races  # noqa: F401
from tests.kernels.recurrent import (
    HOPPER,
    causal_mask,
    channel_problem,
    decays,
    fused,
    joined,
    off_of_decays,
)

slow = pytest.mark.slow


def problem(length, **how):
    given = channel_problem(length, batch=1, **{"key": 64, "value": 64, **how})
    return given | {name: jnp.asarray(given[name], jnp.bfloat16) for name in "qkv"}


def result(given, mask):
    mask = causal_mask(mask, given["v"].shape[1], batch=1)
    recurrence = joined(reference.gated_linear_attention)
    return both(fused(op, "hopper", INTERPRET), recurrence, given, mask)


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [
        (70, "all", {"heads": 2, "groups": 1}),
        (130, "causal", {"heads": 1, "key": 128, "value": 192}),
        pytest.param(130, "causal", {"key": 128, "value": 256, "heads": 2}, marks=slow),
        *HOPPER,
    ],
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, how):
    """With grouped heads, padding, segments and states, of which some fade at once."""
    agree(result(problem(length, **how), mask), forward=5e-3, backward=1e-2)


@slow
@pytest.mark.parametrize(
    ("count", "how"), [(2, {"heads": 2, "groups": 1}), (4, {"heads": 1, "key": 48, "value": 96})]
)
def test_a_sequence_in_pieces_gives_what_it_gives_whole(count, how, monkeypatch):
    asked = []
    monkeypatch.setattr(split, "pieces", lambda *sizes: asked.append(sizes) or count)
    jax.clear_caches()
    agree(result(problem(256, **how), "all"), forward=5e-3, backward=1e-2)
    assert asked
    jax.clear_caches()


@slow
def test_the_gradient_of_decays_is_as_good_after_many_tokens():
    given = problem(768, heads=1)
    given["log_decay"] = decays(given["log_decay"].shape)
    assert off_of_decays(op, given, "hopper", INTERPRET) < 4e-3
