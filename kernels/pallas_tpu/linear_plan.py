"""Sizes, blocks and layouts of linear attention's kernels on TPU, and how they are called."""

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tuned
from kernels.fused.passes import Projection
from kernels.fused.ways import Ways
from kernels.pallas_tpu.chip import LANES, VMEM
from kernels.varying import alike

VECTORS = ("row", "col", "start", "end", "keep", "segment", "inv_den")
"""The rows of the block [7, C] of a chunk's float32 numbers per token."""

UNITS = 8
"""The most heads times parts of a step."""

f32 = jnp.float32


class Sizes(NamedTuple):
    """At most. chunk: tokens of a chunk. parts: chunks of a step, which fill each other's waits, as
    heads do. beside: heads of 128 channels to a block, without a projection.
    """

    chunk: int = 128
    parts: int = 4
    beside: int = 4


class Plan(NamedTuple):
    """Sizes and choices of a call, all static. packed: heads to a block; depth: D; dim: Dv.

    parts: chunks of a step, which a head's state passes in turn.
    """

    batch: int
    heads: int
    length: int
    depth: int
    dim: int
    packed: int
    chunk: int
    rank: int | None
    half: float | None
    scaled: bool
    segmented: bool
    parts: int = 1
    backwards: bool = False

    @property
    def shared(self) -> int:
        """Heads that have lanes in common, as a block of 128 has: all of a block's, or 1."""
        return 1 if self.depth % LANES == 0 and self.dim % LANES == 0 else self.packed

    @property
    def rows(self) -> int:
        """Of a head's S: features, or the channels of all heads that share its lanes."""
        return self.rank or self.shared * self.depth

    @property
    def step(self) -> int:
        """Tokens of a step."""
        return self.parts * self.chunk

    @property
    def grid(self) -> tuple[int, int, int]:
        """Batch, blocks of heads, steps."""
        return self.batch, self.heads // self.packed, self.length // self.step

    @property
    def order(self) -> Sequence[int]:
        """A step's parts as the state passes them."""
        return range(self.parts)[:: -1 if self.backwards else 1]

    def in_parts(self, parts: int) -> "Plan":
        """With as many chunks to a step, of the divisors up to `parts`, as there may be."""
        count = self.length // self.chunk
        return self._replace(parts=max(n for n in range(1, parts + 1) if count % n == 0))

    def whole(self) -> "Plan":
        """Each step one chunk."""
        return self._replace(chunk=self.step, parts=1)


def packed_heads(heads: int, *channels: int) -> int:
    """The fewest heads whose channels are whole lanes; all of them, which any block may have."""
    for n in range(1, heads):
        if heads % n == 0 and not any(n * c % LANES for c in channels):
            return n
    return heads


def sizes_of(rank: int, dim: int) -> Sizes:
    """Those for R features and Dv channels of a value."""
    rule = Sizes() if max(rank, dim) <= 2 * LANES else Sizes(parts=2)
    return tuned.sizes(f"linear R{rank} D{dim}", rule)


def beside(heads: int, arrays) -> int:
    """Heads of a block that share no lanes: more than one where all is known to fit."""
    like = (heads, LANES, jnp.bfloat16)
    if any((*x.shape[2:], x.dtype) != like for x in arrays):
        return 1
    return math.gcd(heads, sizes_of(LANES, LANES).beside)


def make_plan(arrays, projection: Projection | None, chunk: int, ways: Ways | None = None) -> Plan:
    """The plan of a call on [B,T,G,D] arrays, the first with D channels, the last with Dv."""
    first, last = arrays[0], arrays[-1]
    heads, depth, dim = max(x.shape[2] for x in arrays), first.shape[3], last.shape[3]
    assert first.shape[1] % chunk == 0, (first.shape, chunk)
    return Plan(
        first.shape[0], heads, first.shape[1], depth, dim, packed_heads(heads, depth, dim), chunk,
        rank=None if projection is None else projection.weight.shape[0],
        half=None if projection is None else projection.half,
        scaled=ways is not None,
        segmented=ways is not None and ways.segments is not None,
    )  # fmt: skip


def plan_of(arrays, projection: Projection | None, chunk: int, ways: Ways | None = None) -> Plan:
    """The plan of a call, in steps of several chunks and, where there is room, heads."""
    plan = make_plan(arrays, projection, chunk, ways)
    if projection is None:
        plan = plan._replace(packed=max(plan.packed, beside(plan.heads, arrays)))
    parts = sizes_of(plan.rank or plan.depth, plan.dim).parts
    return plan.in_parts(max(1, min(parts, UNITS // plan.packed)))


class Array(NamedTuple):
    """An operand, or what a result will be, and its block: `at(b, h, c)` of the grid's place."""

    value: Any
    block: tuple[int | None, ...]
    at: Any

    def spec(self, plan: Plan) -> pl.BlockSpec:
        """The block's place in the array for each step of the grid."""
        last = plan.grid[2] - 1
        turn = (lambda c: last - c) if plan.backwards else (lambda c: c)
        return pl.BlockSpec(self.block, lambda b, h, c: self.at(b, h, turn(c)))


def call(body, plan: Plan, ins, outs, *, interpret, scratch=None):
    """Run `body(refs by name)` over the grid: results by name."""
    scratch = scratch or {}
    names = [*ins, *outs, *scratch]

    def kernel(*refs):
        body(SimpleNamespace(**dict(zip(names, refs, strict=True))))

    arrays = alike([x.value for x in ins.values()])
    varies = jax.typeof(arrays[0]).manual_axis_type  # inside a shard_map
    results = pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[x.spec(plan) for x in ins.values()],
        out_specs=[x.spec(plan) for x in outs.values()],
        out_shape=[x.value.update(manual_axis_type=varies) for x in outs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret or False,
    )(*arrays)
    return dict(zip(outs, results, strict=True))


def tokens(plan: Plan, **arrays) -> dict[str, Array]:
    """[B,T,G,D] arrays, their heads side by side; one of fewer heads is read, or repeated."""
    made = {}
    for name, x in arrays.items():
        if plan.packed > 1 and x.shape[2] != plan.heads:
            x = jnp.repeat(x, plan.heads // x.shape[2], axis=2)
        per = plan.heads // x.shape[2]
        block = (None, plan.step, plan.packed * x.shape[3])
        at = functools.partial(lambda b, h, c, per: (b, c, jax.lax.div(h, per)), per=np.int32(per))
        made[name] = Array(x.reshape(*x.shape[:2], -1), block, at)
    return made


def wide(plan: Plan, dtype, channels: int) -> Array:
    """A result [B, T, H channels]."""
    shape = jax.ShapeDtypeStruct((plan.batch, plan.length, plan.heads * channels), dtype)
    return Array(shape, (None, plan.step, plan.packed * channels), lambda b, h, c: (b, c, h))


def rows_of(plan: Plan) -> Array:
    """A result of one float32 number per token and head."""
    shape = (plan.batch, plan.heads, plan.length // plan.chunk, 1, plan.chunk)
    return by_chunk(plan, jax.ShapeDtypeStruct(shape, f32))


def by_chunk(plan: Plan, x) -> Array:
    """An array [B,H,N,...] of which a step has its heads' and its chunks' part."""
    block = (None, plan.packed, plan.parts, *x.shape[3:])
    return Array(x, block, lambda b, h, c: (b, h, c, 0, 0))


def lines(plan: Plan, **arrays) -> dict[str, Array]:
    """[B,H,T] arrays, those that are not None, as `lines` [B,H,N,n,C]."""
    given = [x for x in arrays.values() if x is not None]
    return {"lines": by_chunk(plan, _stacked(plan, given))} if given else {}


def _stacked(plan: Plan, arrays):
    x = jnp.stack([jnp.broadcast_to(x, (plan.batch, plan.heads, plan.length)) for x in arrays], 2)
    return rearrange(x, "b h e (n c) -> b h n e c", c=plan.chunk)


def joined(x):
    """`rows_of` as [B, H, T]."""
    return rearrange(x, "b h n 1 c -> b h (n c)")


def ways_in(plan: Plan, ways: Ways | None, inv_den=None) -> dict[str, Array]:
    """`VECTORS` of every token; what a call does not need is 0."""
    if ways is None and inv_den is None:
        return {}
    made = dict.fromkeys(VECTORS, jnp.zeros((1, 1, 1), f32))
    if ways is not None:
        keep = jnp.repeat(ways.keep, plan.chunk, axis=2)
        made |= dict(zip(VECTORS, (*ways[:4], keep), strict=False))
        if ways.segments is not None:  # counted, so that float32 holds them
            changes = ways.segments[:, 1:] != ways.segments[:, :-1]
            count = jnp.cumsum(jnp.pad(changes, [(0, 0), (1, 0)]).astype(jnp.int32), axis=1)
            made["segment"] = count.astype(f32)[:, None]
    if inv_den is not None:
        made["inv_den"] = inv_den
    return {"vectors": by_chunk(plan, _stacked(plan, made.values()))}


def weight_in(plan: Plan, projection: Projection | None, like) -> dict[str, Array]:
    """The projection, if there is one, beside itself for every head of a block.

    Where x is bfloat16 it is in two parts, one beside the other, whose sum has 16 bits of mantissa:
    what a logit is off by, its feature is off by in parts.
    """
    if projection is None:
        return {}
    weight = jnp.tile(projection.weight.astype(f32), (1, plan.shared))
    if like.dtype == f32:
        parts = weight
    else:
        high = jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
        parts = jnp.concatenate([high, weight - high], axis=1).astype(like.dtype)
    return {"weight": Array(parts, parts.shape, lambda b, h, c: (0, 0))}


def state_in(plan: Plan, state) -> dict[str, Array]:
    """S and z, each head's in the rows and lanes of its block."""
    if state is None:
        return {}
    state = [jnp.repeat(x, plan.heads // x.shape[1], axis=1) for x in state]
    sums, norm = (rearrange(x, "b (p n) ... -> b p n ...", n=plan.packed) for x in state)
    norm = norm[:, :, :, None]
    if plan.shared > 1:
        places = [_place(plan, a) for a in range(plan.packed)]
        sums = jnp.stack([jnp.pad(sums[:, :, a], [(0, 0), (0, 0), *_outside(plan, *p)])
                          for a, p in enumerate(places)], 2)  # fmt: skip
        norm = jnp.stack([jnp.pad(norm[:, :, a], [(0, 0), (0, 0), (0, 0), _outside(plan, *p)[0]])
                          for a, p in enumerate(places)], 2)  # fmt: skip
    return {"state_sums": _state(plan, sums), "state_norm": _state(plan, norm)}


def _place(plan: Plan, a: int) -> tuple[slice, slice]:
    """The rows and lanes of S that are head a's own."""
    if plan.shared == 1:
        return slice(None), slice(None)
    rows = slice(None) if plan.rank else slice(a * plan.depth, (a + 1) * plan.depth)
    return rows, slice(a * plan.dim, (a + 1) * plan.dim)


def _outside(plan: Plan, rows: slice, lanes: slice) -> list[tuple[int, int]]:
    width = plan.packed * plan.dim
    first = (0, 0) if plan.rank else (rows.start, plan.rows - rows.stop)
    return [first, (lanes.start, width - lanes.stop)]


def _state(plan: Plan, x) -> Array:
    return Array(x, (None, None, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0, 0))


def state_out(plan: Plan) -> dict[str, Array]:
    """The state that the last chunk leaves."""
    batch, blocks = plan.grid[:2]
    shapes = {"left_sums": (plan.rows, plan.shared * plan.dim), "left_norm": (1, plan.rows)}
    return {
        name: _state(plan, jax.ShapeDtypeStruct((batch, blocks, plan.packed, *x), f32))
        for name, x in shapes.items()
    }


def state_scratch(plan: Plan) -> dict[str, Any]:
    """The state between chunks."""
    return {
        "sums": pltpu.VMEM((plan.packed, plan.rows, plan.shared * plan.dim), f32),
        "norm": pltpu.VMEM((plan.packed, 1, plan.rows), f32),
    }


def state_of(plan: Plan, made):
    """(S [B,H,R,Dv], z [B,H,R]) out of what the last chunk wrote."""
    sums, norm = made["left_sums"], made["left_norm"]
    places = [_place(plan, a) for a in range(plan.packed)]
    sums = [sums[:, :, a, rows, lanes] for a, (rows, lanes) in enumerate(places)]
    norm = [norm[:, :, a, 0, rows] for a, (rows, _) in enumerate(places)]
    return tuple(rearrange(jnp.stack(x, 2), "b p n ... -> b (p n) ...") for x in (sums, norm))
