"""Generation: multiply-adds by formulas, a state that does not grow beside a cache that does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.errors import UserError
from efficient_attn.tools.count import multiply_adds
from efficient_attn.tools.measures import generation

SHAPE = {"depth": 2, "width": 16, "heads": 2}


def test_recomputed_is_the_sum_of_all_prefixes():
    source = Input(kind="text", shape=(6,), classes=256, vocab=256)
    model = backbones.create(
        "causal_lm", SHAPE, attention="softmax", source=source, rngs=nnx.Rngs(0)
    )
    total = 0
    for length in range(1, 7):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        scores = (length - 1) * 16 * 256  # those of the last value alone are needed
        total += multiply_adds(model, tokens) - scores
    assert generation.recomputed(6, depth=2, width=16) == total


def test_a_cache_is_read_whole_and_a_state_is_as_large_at_every_length():
    adds = {
        name: [generation.step(name, n, SHAPE) for n in (8, 16)] for name in ("softmax", "linear")
    }
    assert adds["softmax"][1] - adds["softmax"][0] == 2 * 2 * 8 * 16
    assert adds["linear"][0] == adds["linear"][1]


@pytest.mark.slow
def test_softmax_beside_itself_and_without_its_cache():
    given = {"seed": 0, "expression": "softmax", "length": 8, "turns": 1, **SHAPE}
    found = generation.measure(carry=True, **given)
    assert found["times_cached"] == 1 and found["state_bytes"] == 2 * 2 * 8 * 16 * 4
    again = generation.measure(carry=False, **given)
    assert again == {"multiply_adds": generation.recomputed(8, depth=2, width=16)}
    with pytest.raises(UserError, match="counted for softmax"):
        generation.measure(carry=False, **(given | {"expression": "linear"}))
