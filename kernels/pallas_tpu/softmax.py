"""Softmax attention on TPU: one pass over the keys, no logits in memory (arXiv 2205.14135).

Where a block of queries sees one block of keys only, the softmax is taken at once; where that block
is all keys, one kernel makes all three gradients; else one makes dq, another dk and dv.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.fused.softmax import Tiles
from kernels.pallas_tpu import softmax_body as body
from kernels.pallas_tpu import softmax_layout as layout
from kernels.pallas_tpu import softmax_plan as plans
from kernels.pallas_tpu.chip import LANES, VMEM
from kernels.pallas_tpu.softmax_plan import Plan, tiles

__all__ = ["backward", "forward", "refuse", "tiles"]


def refuse(q, k, v, *, causal, window, segments, keys, resident) -> str | None:
    """See `kernels.fused.softmax`."""
    del k, v, causal, window, segments, keys, resident
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 or float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"the TPU softmax kernels take a head dim up to 256, not {q.shape[-1]}"
    return None


def forward(q, k, v, *, segments, keys, tiles: Tiles, **options):
    """See `kernels.fused.softmax`."""
    plan = plans.plan(q, k, segments=segments, keys=keys, tiles=tiles, **options)
    heads, steps = plan.heads, plan.steps()
    given = layout.to_queries(heads, q), layout.to_keys(heads, k), layout.to_keys(heads, v)
    query, key, row, ids = _specs(plan, *_by_queries(plan))
    batch, blocks = q.shape[0], given[0].shape[2] // heads.query_lanes
    scratch = [] if steps == 1 else [_stats(plan), _stats(plan), _sums(plan)]
    out, lse = _call(
        "forward", body.forward_once if steps == 1 else body.forward_steps, plan,
        grid=(batch, blocks, plan.blocks[0], steps),
        in_specs=[query, key, key, *ids],
        out_specs=[query, row],
        outs=[(given[0].shape, v.dtype), ((batch, blocks, heads.count, q.shape[1]), jnp.float32)],
        scratch=[*scratch, *_column_of_numbers(plan)],
        operands=(*given, *plans.numbers(segments, keys, k)),
    )  # fmt: skip
    return layout.from_queries(heads, out, q), layout.from_rows(heads, lse, q)


def backward(q, k, v, out, lse, dout, dlse, *, segments, keys, tiles: Tiles, **options):
    """See `kernels.fused.softmax`."""
    plan = plans.plan(q, k, segments=segments, keys=keys, tiles=tiles, **options).smaller()
    heads = plan.heads
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0) * body.LOG2E
    given = (
        layout.to_queries(heads, q), layout.to_keys(heads, k), layout.to_keys(heads, v),
        layout.to_queries(heads, dout), layout.to_rows(heads, lse),
    )  # fmt: skip
    results = layout.to_queries(heads, out), layout.to_rows(heads, dlse)
    ids = plans.numbers(segments, keys, k)
    if plan.blocks[1] == 1:
        dq, dk, dv = _backward_resident(plan, (*given, *results, *ids))
    else:
        dq, rest = _backward_queries(plan, (*given, *results, *ids))
        dk, dv = _backward_keys(plan, (*given, rest, *ids))
    back = layout.from_keys(heads, dk, k), layout.from_keys(heads, dv, v)
    return layout.from_queries(heads, dq, q), *back


def _backward_queries(plan: Plan, operands):
    query, key, row, ids = _specs(plan, *_by_queries(plan))
    q, rows = operands[0], operands[4]
    return _call(
        "dq", body.query_grads, plan,
        grid=(q.shape[0], rows.shape[1], plan.blocks[0], plan.steps()),
        in_specs=[query, key, key, query, row, query, row, *ids],
        out_specs=[query, row],
        outs=[(q.shape, q.dtype), (rows.shape, jnp.float32)],
        scratch=[_sums(plan), _stats(plan), _stats(plan), *_column_of_numbers(plan)],
        operands=operands,
    )  # fmt: skip


def _backward_keys(plan: Plan, operands):
    steps, parts = plan.steps(across=True), plan.heads.parts

    def query_at(h, j, s):
        first, last = plan.queries_of(j)
        return jnp.minimum(first + jax.lax.rem(s, steps), last), h * parts + jax.lax.div(s, steps)

    query, key, row, ids = _specs(plan, query_at, lambda h, j, s: (j, h))
    k, v = operands[1:3]
    return _call(
        "dkv", functools.partial(body.key_grads, steps=steps), plan,
        grid=(k.shape[0], k.shape[2] // plan.heads.key_lanes, plan.blocks[1], parts * steps),
        in_specs=[query, key, key, query, row, row, *ids],
        out_specs=[key, key],
        outs=[(k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[*_sums_of_keys(plan), *_column_of_numbers(plan, across=True)],
        operands=operands,
    )  # fmt: skip


def _backward_resident(plan: Plan, operands):
    blocks, parts = plan.blocks[0], plan.heads.parts

    def query_at(h, s):
        return jax.lax.rem(s, blocks), h * parts + jax.lax.div(s, blocks)

    query, key, row, ids = _specs(plan, query_at, lambda h, s: (0, h))
    q, k, v = operands[:3]
    return _call(
        "dqkv", body.all_grads, plan,
        grid=(k.shape[0], k.shape[2] // plan.heads.key_lanes, parts * blocks),
        in_specs=[query, key, key, query, row, query, row, *ids],
        out_specs=[query, key, key],
        outs=[(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[
            pltpu.VMEM((1, 1, plan.heads.count, plan.tiles.q), jnp.float32),
            *_sums_of_keys(plan), *_column_of_numbers(plan, across=True),
        ],
        operands=operands,
    )  # fmt: skip


def _call(name, kernel, plan: Plan, *, grid, in_specs, out_specs, outs, scratch, operands):
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in outs
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",),
            vmem_limit_bytes=VMEM,
        ),
        interpret=plan.interpret or False,
        name=f"softmax_{name}",
    )(*operands)


def _by_queries(plan: Plan):
    """Blocks at (h, i, step), of positions and of heads: of queries, and of keys."""

    def key_at(h, i, step):
        first, last = plan.keys_of(i)
        return jnp.minimum(first + step, last), jax.lax.div(h, plan.heads.parts)

    return lambda h, i, step: (i, h), key_at


def _specs(plan: Plan, query_at, key_at):
    """Specs of arrays like q, like k, of rows like log-sum-exp, and [of the numbers of both]."""
    (block_q, block_k), heads = plan.tiles, plan.heads

    def row_at(b, *at):
        block, head = query_at(*at)
        return b, head, 0, block

    mine = pl.BlockSpec((1, 1, block_q), lambda b, *at: (b, 0, query_at(*at)[0]))
    theirs = pl.BlockSpec((1, 1, block_k), lambda b, *at: (b, 0, key_at(*at)[0]))
    return (
        pl.BlockSpec((1, block_q, heads.query_lanes), lambda b, *at: (b, *query_at(*at))),
        pl.BlockSpec((1, block_k, heads.key_lanes), lambda b, *at: (b, *key_at(*at))),
        pl.BlockSpec((1, 1, heads.count, block_q), row_at),
        [*[mine] * plan.own, *[theirs] * plan.masked],
    )


def _stats(plan: Plan):
    """A number for each row of logits, the same in all lanes."""
    return pltpu.VMEM((plan.heads.count, plan.tiles.q, LANES), jnp.float32)


def _sums(plan: Plan):
    return pltpu.VMEM((plan.tiles.q, plan.heads.query_lanes), jnp.float32)


def _sums_of_keys(plan: Plan):
    return [pltpu.VMEM((plan.tiles.k, plan.heads.key_lanes), jnp.float32)] * 2


def _column_of_numbers(plan: Plan, across: bool = False):
    """Where the numbers of the rows of logits stand as a column, if they differ."""
    if not (plan.masked if across else plan.own):
        return []
    return [pltpu.VMEM((plan.tiles.k if across else plan.tiles.q, LANES), jnp.int32)]
