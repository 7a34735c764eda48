"""Every mechanism with the options that the contract tests run, and how they run it.

A mechanism's file in `tests/mechanisms/` states

    VARIANTS      {expression: its parameters at `site()`}; the first is tested the most widely
    reference     (weights, config, problem) -> [B, T, E], float64 (see `attention/oracles.py`)
    SCALE         optional, {expression: factor}: inputs smaller than standard normal
    uncounted     optional, (config, length) -> multiply-adds of `cost` that are not matrix products
"""

import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention import Site, kernelised
from efficient_attn.attention.base import nearly_square
from efficient_attn.layers.rngs import make_rngs
from kernels import Mask

MECHANISMS = {
    name: importlib.import_module(f"tests.mechanisms.{name}")
    for name in attention.MIXERS
    if (Path(__file__).parent / "mechanisms" / f"{name}.py").exists()
}
"""The test file of every mechanism; `tests/test_completeness.py` asks for those that lack."""
VARIANTS: dict[str, tuple[str, ...]] = {
    name: tuple(module.VARIANTS) for name, module in MECHANISMS.items()
}
PARAMETERS = {e: count for m in MECHANISMS.values() for e, count in m.VARIANTS.items()}
FIRSTS = tuple(texts[0] for texts in VARIANTS.values())
EXPRESSIONS = tuple(text for texts in VARIANTS.values() for text in texts)
LENGTHS = (1, 7, 63, 100)
BATCH, WIDTH, HEADS, SEQ = 4, 32, 4, 100
CHUNK = 16  # of attention by features, here: a length of 63 is then four chunks, the last one cut


@functools.cache
def fast() -> dict[str, Any]:
    """Compiler options for a fifth of its time and the same arithmetic, where it has them."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:  # newer ones have no such emitters
        return {"xla_backend_optimization_level": 0}
    return options


def choice(expression: str) -> attention.Choice:
    return attention.pattern(expression, 1)[0]


def able(expression: str) -> frozenset[str]:
    made = choice(expression)
    return made.mechanism.capabilities(made.config)


def plain(expression: str) -> Mask:
    """The least mask there is for it: nothing hidden but, for a recurrence, the future."""
    return Mask(causal="bidirectional" not in able(expression))


def those_with(*capabilities: str) -> list[str]:
    return [e for e in EXPRESSIONS if able(e) >= set(capabilities)]


def site(**options: Any) -> Site:
    return Site(**{"width": WIDTH, "heads": HEADS, "seq": SEQ, "layer": 0} | options)


def place(expression: str, length: int) -> dict[str, Any]:
    """What a site must say for sequences of this length: of a picture, its rows and columns."""
    if not choice(expression).mechanism.on_grids:
        return {}
    return {"seq": length, "grid": nearly_square(length)}


class Holder(nnx.Module):
    """A mixer and what it shares with other layers, as a backbone holds them."""

    def __init__(self, expression: str, where: Site, *, needs=()):
        shared: dict[str, nnx.Module] = {}
        self.mixer = attention.build(
            expression, where, needs=needs, rngs=make_rngs(0), shared=shared
        )
        self.shared = nnx.Dict(shared)

    def __call__(self, x, context=None, *, mask, rngs=None):
        return self.mixer(x, context, mask=mask, rngs=rngs, shared=self.shared)


def abstract(expression: str, **options: Any) -> Holder:
    """The mechanism with shapes for numbers."""
    where = place(expression, options.get("seq", SEQ)) | options
    return nnx.eval_shape(lambda: Holder(expression, site(**where)))


@functools.cache
def holder(expression: str, **options: Any) -> Holder:
    """The mechanism at `site(**options)`, every number of it drawn: no zero bias hides a fault."""
    module = abstract(expression, **options)
    random = np.random.default_rng(1)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path)
        scale = leaf.shape[-2] ** -0.5 if "kernel" in name and leaf.ndim >= 2 else 0.1
        scale = 1.0 if "projection" in name else scale
        drawn = scale * random.standard_normal(leaf.shape)
        drawn = 0.5 + np.abs(drawn) if "'var'" in name else drawn  # of a norm over batches
        return jnp.asarray(drawn, leaf.dtype)

    nnx.update(module, jax.tree_util.tree_map_with_path(fill, nnx.state(module)))
    return module


def weights(module: nnx.Module) -> dict[str, Any]:
    """All numbers of a module as nested dicts, float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(module)))


class Gradient(NamedTuple):
    params: dict[str, Any]
    x: np.ndarray
    context: np.ndarray | None


class Result(NamedTuple):
    out: np.ndarray
    grad: Gradient


@functools.cache
def _compiled(expression: str, causal: bool, **options: Any):
    graph, params, rest = nnx.split(holder(expression, **options), nnx.Param, ...)

    def call(params, x, context, keys, segments, cotangent):
        def forward(params, x, context):
            mask = Mask(causal=causal, keys=keys, segments=segments)
            return nnx.merge(graph, params, rest)(x, context, mask=mask)

        out, back = jax.vjp(forward, params, x, context)
        return out, back(cotangent.astype(out.dtype))

    return jax.jit(call, compiler_options=fast()), params


def run(
    expression: str, x, *, context=None, keys=None, segments=None, causal=False, cotangent=None,
    **options: Any,
) -> Result:  # fmt: skip
    """Output and gradients (of <output, cotangent>), jitted once per set of shapes.

    A single segment is no mask, and not given to what has no segments; nor are keys that are all
    there, to what has no padding.
    """
    if segments is not None and not segments.any() and "segments" not in able(expression):
        segments = None
    if keys is not None and keys.all() and "padding" not in able(expression):
        keys = None
    options |= place(expression, x.shape[1])
    with short_chunks():
        function, params = _compiled(expression, causal, **options)
        cotangent = draw(x.shape, seed=99) if cotangent is None else cotangent
        out, (d_params, dx, dc) = function(params, x, context, keys, segments, cotangent)
    grads = Gradient(to_numpy(nnx.to_pure_dict(d_params)), to_numpy(dx), to_numpy(dc))
    return Result(to_numpy(out), grads)


def short_chunks():
    """Chunks short enough that the tests' lengths cross them."""
    return _Patch(kernelised, "CHUNK", CHUNK)


class _Patch:
    def __init__(self, place, name: str, value):
        self.place, self.name, self.value = place, name, value

    def __enter__(self):
        self.before = getattr(self.place, self.name)
        setattr(self.place, self.name, self.value)

    def __exit__(self, *_):
        setattr(self.place, self.name, self.before)


def to_numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), tree)


def draw(shape, *, seed: int, expression: str = "") -> np.ndarray:
    """Standard normal numbers, smaller where the mechanism needs it."""
    module = MECHANISMS.get(expression.partition("(")[0])
    scale = getattr(module, "SCALE", {}).get(expression, 1.0)
    numbers = scale * np.random.default_rng(seed).standard_normal(shape)
    return numbers.astype(np.float32)


def draw_x(expression: str, length: int, *, seed: int = 0, batch: int = BATCH) -> np.ndarray:
    return draw((batch, length, WIDTH), seed=seed, expression=expression)


def everyone(length: int, batch: int = BATCH) -> np.ndarray:
    """Keys of a batch without padding."""
    return np.ones((batch, length), bool)


def one_segment(length: int, batch: int = BATCH) -> np.ndarray:
    return np.zeros((batch, length), np.int32)


def ragged_keys(length: int) -> np.ndarray:
    """Rows: no padding; a padded end; holes and a padded beginning; nothing but padding."""
    keys = everyone(length)
    keys[1, max(1, 2 * length // 3) :] = False
    keys[2, ::3] = False
    keys[2, : length // 5] = False
    keys[3] = False
    return keys


def padded_keys(expression: str, length: int) -> np.ndarray:
    """`ragged_keys` for what honours them, `everyone` for what has no padding."""
    return ragged_keys(length) if "padding" in able(expression) else everyone(length)


def ragged_segments(length: int) -> np.ndarray:
    """Segments of uneven lengths, other ones in each row."""
    at = np.arange(length)
    rows = [
        (at >= length // (8 + row)).astype(int) + (at >= 3 * length // 5) for row in range(BATCH)
    ]
    return np.stack(rows).astype(np.int32)


def relative(got, expected) -> float:
    """|got - expected| / |expected|, in the 2-norm of all numbers."""
    got, expected = (np.asarray(x, np.float64).ravel() for x in (got, expected))
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))
