"""What layers cost beside others: exact memory and multiply-adds, and time in turns.

Memory is what XLA's compiler says the function holds beside its arguments and results, on the
device at hand; multiply-adds are counted off the jaxpr, a scan by its length. Neither runs
anything, so both are exact, at lengths that would not fit as well. Seconds are of this machine.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.attention import MIXERS, Site
from efficient_attn.attention.multihead import make_mixer
from efficient_attn.attention.spec import parse, tile
from efficient_attn.blocks.transformer import Block, Shape
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.count import multiply_adds
from efficient_attn.tools.measures.baselines import BASELINES
from kernels import Mask

Part = Literal["attention", "block"]
Mode = Literal["forward", "training"]


class Layout(NamedTuple):
    """Layers and their input, float32 [batch, length, width].

    part: "attention" is the layer with its projections alone, "block" also normalisation, residual
    sums and a feed-forward layer of mlp_ratio * width.
    """

    part: Part
    length: int
    width: int
    heads: int
    depth: int
    mlp_ratio: float
    batch: int


class Exact(NamedTuple):
    """Multiply-adds of the forward pass of one example; bytes held by the function of the mode."""

    multiply_adds: int
    held_bytes: int


def measure(
    *,
    seed: int,
    expression: str,
    against: str,
    mode: Mode,
    part: Part,
    length: int,
    width: int,
    heads: int,
    depth: int,
    mlp_ratio: float,
    batch: int,
    timed: int,
    turns: int,
) -> dict[str, float | int]:
    """Layers with the attention `expression`, and how many times less they cost than `against`.

    Both may be "materialised" or "identity" (`measures.baselines`) beside all of
    `attention.MIXERS`. mode: "forward", or "training": gradients of the mean square of the output
    by all parameters and the input.

    Returns "multiply_adds", "held_bytes", and the quotients against / ours "adds_saved" and
    "memory_saved"; up to the length `timed` "step_seconds", the best of `turns` taken by turns, and
    "speed_up".

    Raises:
        UserError: an expression that cannot be read, or does not fit.
    """
    layout = Layout(part, length, width, heads, depth, mlp_ratio, batch)
    ours, theirs = (exact(name, layout, mode) for name in (expression, against))
    found: dict[str, float | int] = {
        "multiply_adds": ours.multiply_adds,
        "held_bytes": ours.held_bytes,
        "adds_saved": theirs.multiply_adds / max(ours.multiply_adds, 1),
        "memory_saved": theirs.held_bytes / max(ours.held_bytes, 1),
    }
    if length <= timed:
        mine, other = by_turns((expression, against), layout, mode, seed=seed, turns=turns)
        found |= {"step_seconds": mine, "speed_up": other / mine}
    return found


class Layers(nnx.Module):
    """`depth` layers in a row, nothing before or after them."""

    def __init__(self, expression: str, layout: Layout, *, rngs: nnx.Rngs):
        site = Site(width=layout.width, heads=layout.heads, seq=layout.length)
        shape = Shape(
            depth=layout.depth, width=layout.width, heads=layout.heads,
            mlp_ratio=layout.mlp_ratio, dropout=0.0,
        )  # fmt: skip
        shared: dict[str, nnx.Module] = {}
        self.part = layout.part
        layers = []
        for choice in tile(parse(expression, MIXERS | BASELINES), layout.depth):
            here = replace(site, layer=len(layers))
            if layout.part == "attention":
                layers.append(make_mixer(choice, here, rngs=rngs, shared=shared))
                continue
            block = Block(
                choice, shape, here,
                needs={"bidirectional"}, rngs=rngs, shared=shared, drop_path=0.0,
            )  # fmt: skip
            layers.append(block)
        self.layers, self.shared = nnx.List(layers), nnx.Dict(shared)

    def __call__(self, x):
        """[B,T,E] -> [B,T,E], nothing masked."""
        for layer in self.layers:
            if self.part == "attention":
                x = layer(x, mask=Mask(), shared=self.shared)
            else:
                x = layer(x, mask=Mask(), rngs=None, shared=self.shared)
        return x


def functions(expression: str, layout: Layout) -> tuple[dict[Mode, Callable], Callable[[int], Any]]:
    """The function of each mode, of (params, rest, x), and what makes these from a seed."""

    graph = nnx.split(nnx.eval_shape(lambda: Layers(expression, layout, rngs=make_rngs(0))))[0]

    def arguments(seed):
        layers = Layers(expression, layout, rngs=make_rngs(seed))
        params, rest = map(nnx.to_pure_dict, nnx.split(layers, nnx.Param, ...)[1:])
        x = jax.random.normal(jax.random.key(seed), (layout.batch, layout.length, layout.width))
        return params, rest, x

    def forward(params, rest, x):
        return nnx.merge(graph, params, rest)(x)

    def training(params, rest, x):
        loss = lambda params, x: jnp.mean(jnp.square(forward(params, rest, x)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(params, x)

    return {"forward": forward, "training": training}, arguments


@functools.lru_cache(maxsize=256)
def exact(expression: str, layout: Layout, mode: Mode) -> Exact:
    """Counted and compiled; nothing is run.

    Raises:
        UserError: an expression that cannot be read, or does not fit.
    """
    made, arguments = functions(expression, layout)
    params, rest, x = jax.eval_shape(lambda: arguments(0))
    analysis = compiled(expression, layout, mode).memory_analysis()
    assert analysis is not None
    adds = multiply_adds(made["forward"], params, rest, jax.eval_shape(lambda x: x[:1], x))
    return Exact(adds, analysis.temp_size_in_bytes)


@functools.lru_cache(maxsize=8)
def compiled(expression: str, layout: Layout, mode: Mode) -> jax.stages.Compiled:
    """The function of (params, rest, x), for the device at hand."""
    made, arguments = functions(expression, layout)
    return jax.jit(made[mode]).lower(*jax.eval_shape(lambda: arguments(0))).compile()


def by_turns(
    expressions: tuple[str, ...], layout: Layout, mode: Mode, *, seed: int, turns: int
) -> list[float]:
    """Seconds of a call of each, compiled before; the best of `turns`, one after another."""
    calls = []
    for expression in expressions:
        _, arguments = functions(expression, layout)
        calls.append((compiled(expression, layout, mode), arguments(seed)))
    best = [float("inf")] * len(calls)
    for turn in range(turns + 1):
        for at, (call, given) in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call(*given))
            if turn:
                best[at] = min(best[at], time.perf_counter() - began)
    return best
