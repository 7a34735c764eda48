"""Generating images pixel by pixel: with a state, with a cache of keys and values, with neither."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.config import require
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools import decode_speed
from efficient_attn.tools.count import multiply_adds

VOCAB = decode_speed.VOCAB


def measure(
    *, seed: int, expression: str, carry: bool, length: int, depth: int, width: int, heads: int,
    turns: int,
) -> dict[str, float | int]:  # fmt: skip
    """One image of `length` values of 256, batch 1, by a causal language model of that shape.

    carry: what was read is kept from value to value, as a state or as a cache. Without, every value
    is the last output of a forward pass over all before it, as softmax is often run; that is
    counted, not run.

    Returns "multiply_adds" of the image, each value counted as its last, and if carried
    "image_seconds", "state_bytes" and "times_cached", images a second over those of softmax with
    its cache, both having run by turns (`tools.decode_speed`); `seed` has no say.

    Raises:
        UserError: a mechanism that does not decode, or another than softmax without a carry.
    """
    options = {"depth": depth, "width": width, "heads": heads}
    if not carry:
        require(expression == "softmax", f"carry=False is counted for softmax, not {expression}")
        return {"multiply_adds": recomputed(length, depth=depth, width=width)}
    both = list(dict.fromkeys([expression, "softmax"]))
    found = decode_speed.measure(both, prompt=1, tokens=length - 1, turns=turns, options=options)
    return {
        "multiply_adds": length * step(expression, length, options),
        "image_seconds": length / found[0].tokens_per_second,
        "state_bytes": found[0].state_bytes,
        "times_cached": found[0].tokens_per_second / found[-1].tokens_per_second,
    }


def recomputed(length: int, *, depth: int, width: int) -> int:
    """Multiply-adds of softmax over all prefixes 1 ... N of one image, tied embeddings scored last.

    A prefix of t takes 12 t E^2 + 2 t^2 E a layer, the feed-forward layer being 4 E wide.
    """
    first = length * (length + 1) // 2
    second = length * (length + 1) * (2 * length + 1) // 6
    return depth * (12 * width**2 * first + 2 * width * second) + length * width * VOCAB


def step(expression: str, length: int, options: Mapping[str, Any]) -> int:
    """Multiply-adds of the last of `length` values, for which a cache is read whole."""
    source = Input(kind="text", shape=(length,), classes=VOCAB, vocab=VOCAB)

    def create() -> Any:
        return backbones.create(
            "causal_lm", options, attention=expression, source=source, rngs=make_rngs(0)
        )

    model = nnx.eval_shape(create)
    graph, weights = nnx.split(model)
    state = jax.eval_shape(lambda: model.init_state(1))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)

    def run(weights, state, one):
        model: Any = nnx.merge(graph, weights)
        return model.step(one, state, position=one)

    return multiply_adds(run, weights, state, one)
