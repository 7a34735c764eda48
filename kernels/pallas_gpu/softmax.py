"""Softmax attention on Hopper: flash, sliding window and Linformer's, forward and backward.

Queries stay and keys stream in `forward` and for dq, keys stay and queries stream for dk and dv:
FlashAttention-3's division of work (arXiv 2407.08608) without its overlap within a warpgroup. Where
all keys fit on chip (`RESIDENT`), they stay and the queries stream in `forward`: one maximum, one
exponential, no rescaling.

Products take bfloat16 and give float32; softmax is in float32 and in base 2. Weights are rounded to
bfloat16 before they meet the values or, backward, the gradients. Head dims that are not of `TABLE`
are filled up with zeros, in copies of q, k and v.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import tuned
from kernels.fused.softmax import Tiles, Window
from kernels.pallas_gpu.fit import WIDTHS, filled, whole
from kernels.pallas_gpu.resident import (
    LOG2E,
    PROCESSORS,
    finish,
    resident_forward,
    results,
    types,
    weigh,
)
from kernels.pallas_gpu.sweep import (
    HEIGHT,
    HIDDEN,
    TILE,
    WARPGROUPS,
    Band,
    Block,
    Sweep,
    over,
    part,
    run,
    store,
)
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    ROWS,
    add_matmul,
    constant,
    left,
    matmul,
    shared,
)

RESIDENT = 256
"""Keys that stay on chip at most; more of them stream."""
LEAST = 16
"""Steps that are worth a block of threads of their own where dk and dv are split."""


class Blocks(NamedTuple):
    """Sizes that results do not depend on, but speed, registers and shared memory do.

    keys: of a step of `forward`. stages: steps in flight there. dq: keys of a step for dq. dkv:
    queries of a step for dk and dv.
    """

    keys: int
    stages: int
    dq: int
    dkv: int


TABLE = {64: Blocks(128, 4, 128, 64), 128: Blocks(128, 2, 64, 64)}
"""Head dim -> blocks. Each compiles for H200 without spills, with any mask (`kernels.static`)."""


def blocks_of(dim: int) -> Blocks:
    """Those tuned for the chip at hand, or of `TABLE`."""
    return tuned.sizes(f"softmax D{dim}", TABLE[dim])


def tiles(q, k, *, causal: bool, window: Window, resident: bool) -> Tiles:
    """What T and S are multiples of; all keys where they stay on chip."""
    del q, window
    keys = -(-k.shape[1] // TILE) * TILE
    return Tiles(TILE, keys if resident and not causal and keys <= RESIDENT else TILE)


def refuse(q, k, v, *, causal, window, segments, keys, resident) -> str | None:
    """Why these kernels do not take the arguments, and what to do; None if they do."""
    del k, v, causal, window, segments, keys, resident
    if q.dtype != jnp.bfloat16:
        return (
            f"the Hopper softmax kernels multiply in bfloat16, the inputs are {q.dtype}; cast them "
            "to bfloat16 or take backend='xla'"
        )
    if q.shape[-1] > WIDTHS[-1]:
        return (
            f"the Hopper softmax kernels take a head dim of up to {WIDTHS[-1]}, not "
            f"{q.shape[-1]}; take backend='xla' or 'cudnn'"
        )
    return None


def forward(
    q, k, v, *, scale: float, causal, window: Window, segments, keys, tiles: Tiles, interpret
) -> tuple[jax.Array, jax.Array]:
    """out [B,T,H,D] and lse float32 [B,H,T]; see `kernels.fused.softmax`."""
    channels = q.shape[3]
    q, k, v = (filled(x, 3, whole(channels)) for x in (q, k, v))
    dense = not causal and window is None and segments is None and scale > 1e-6  # mask: -1e30 / it
    if tiles.k == k.shape[1] <= RESIDENT and dense:
        out, lse = resident_forward(q, k, v, scale=scale, keys=keys, interpret=interpret)
        return out[..., :channels], lse
    batch, queries, heads, dim = q.shape
    blocks, (mine, theirs) = blocks_of(dim), _ids(segments, keys, queries)
    count = queries // TILE
    sweep = Sweep(
        band=_band(causal, window, queries), ids=bool(mine), tiles=count,
        span=_span(count, heads * batch, window), block=blocks.keys,
        count=k.shape[1] // blocks.keys, stages=blocks.stages, repeat=1,
        share=heads // k.shape[2], splits=1, interpret=interpret,
    )  # fmt: skip
    shape = (HEIGHT, blocks.keys)

    def body(rows, loop, index, outputs, scratch):
        (query, *ids), (result, sums, operand) = rows, scratch
        numbers = _numbers(ids)

        def step(block: Block, carry):
            acc, top, total = carry
            key, *key_ids = block.wait(0)
            logits = matmul(shape, (query, key.transpose((1, 0)))) * (scale * LOG2E)
            logits = block.hide(logits, numbers, key_ids)
            block.free(0)
            shrink, weights, top, total = weigh(logits, top, total)
            acc = acc * over(shrink, acc.shape, 0)
            (value,) = block.wait(1)
            weights = left(weights.astype(v.dtype), operand)
            acc = add_matmul(acc, (weights, value), interpret=interpret)
            block.free(1)
            return acc, top, total

        top, total = (constant(x, (HEIGHT,), ROWS) for x in (HIDDEN, 0.0))
        acc, top, total = loop(step, (constant(0.0, (HEIGHT, dim)), top, total))
        finish(acc, top, total, index[:3], outputs, result, sums)

    out, lse = run(
        sweep, body, (q, *mine), ((k, *theirs), (v,)), out=results(dim, v.dtype), operand=v.dtype,
        out_type=types(q, v.dtype),
    )  # fmt: skip
    return out[..., :channels], lse


def backward(
    q, k, v, out, lse, dout, dlse, *, scale: float, causal, window: Window, segments, keys,
    tiles: Tiles, interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dq, dk, dv of `forward`, whose results are out and lse; dlse may be None."""
    del tiles
    delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
    channels = q.shape[3]
    q, k, v, dout = (filled(x, 3, whole(channels)) for x in (q, k, v, dout))
    blocks, live = blocks_of(q.shape[-1]), lse > -jnp.inf
    delta = jnp.where(live, delta if dlse is None else delta - dlse, 0.0)
    lse = jnp.where(live, lse * LOG2E, -HIDDEN)  # weights of exp2(-1e30) = 0
    given = q, k, v, dout, lse, delta
    options = {"scale": scale, "ids": _ids(segments, keys, q.shape[1]), "interpret": interpret}
    band = _band(causal, window, q.shape[1])
    dq = _dq(*given, band=band, block=blocks.dq, **options)
    dkv = _dkv(*given, band=band.turned(), block=blocks.dkv, **options)
    return tuple(x[..., :channels] for x in (dq, *dkv))


def _dq(q, k, v, dout, lse, delta, *, scale, band: Band, ids, block: int, interpret) -> jax.Array:
    """dq = scale sum_s dl_s k_s for dl_s = w_s (<dout, v_s> - delta), w = exp(l - lse)."""
    batch, queries, heads, dim = q.shape
    shape = (HEIGHT, block)
    sweep = Sweep(
        band=band, ids=bool(ids[0]), tiles=queries // TILE, span=1, block=block,
        count=k.shape[1] // block, stages=2, repeat=1, share=heads // k.shape[2], splits=1,
        interpret=interpret,
    )  # fmt: skip

    def body(rows, loop, index, outputs, scratch):
        query, cotangent, *vectors = rows[:4]
        lse, delta = (over(plgpu.load(x, layout=ROWS), shape, 0) for x in vectors)
        numbers, (result, operand) = _numbers(rows[4:]), scratch

        def step(at: Block, acc):
            key, *key_ids = at.wait(0)
            (value,) = at.wait(1)
            logits, dweights = _products(
                shape, (query, key.transpose((1, 0))), (cotangent, value.transpose((1, 0)))
            )
            at.free(1)
            weights = jnp.exp2(at.hide(logits * (scale * LOG2E), numbers, key_ids) - lse)
            dlogits = left((weights * (dweights - delta)).astype(q.dtype), operand)
            acc = add_matmul(acc, (dlogits, key), interpret=interpret)
            at.free(0)
            return acc

        acc = loop(step, constant(0.0, (HEIGHT, dim)))
        store(result, acc * scale, part(outputs[0], *index[:3], HEIGHT))

    return run(
        sweep, body, (q, dout, lse, delta, *ids[0]), ((k, *ids[1]), (v,)), operand=q.dtype,
        out=[shared((WARPGROUPS, HEIGHT, dim), q.dtype)],
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
    )[0]  # fmt: skip


def _dkv(q, k, v, dout, lse, delta, *, scale, band: Band, ids, block: int, interpret):
    """dk = scale sum_t dl_t q_t and dv = sum_t w_t dout_t, over the heads of the group as well."""
    (batch, length, groups, dim), queries, heads = k.shape, *q.shape[1:3]
    shape, tiles, count = (block, HEIGHT)[::-1], length // TILE, queries // block
    splits = max(1, min(PROCESSORS // (tiles * groups * batch), count // LEAST))
    sweep = Sweep(
        band=band, ids=bool(ids[0]), tiles=tiles, span=1, block=block, count=count, stages=2,
        repeat=heads // groups, share=1, splits=splits, interpret=interpret,
    )  # fmt: skip

    def body(rows, loop, index, outputs, scratch):
        numbers, (result, operand) = _numbers(rows[2:]), scratch

        def step(at: Block, carry):
            dk, dv = carry
            (key, value, *_), (query, lse, delta, *query_ids) = at.rows(), at.wait(0)
            logits = matmul(shape, (key, query.transpose((1, 0)))) * (scale * LOG2E)
            lse = over(plgpu.load(lse, layout=COLUMNS), shape, 1)
            weights = jnp.exp2(at.hide(logits, numbers, query_ids) - lse)
            (cotangent,) = at.wait(1)
            weights = weights.astype(q.dtype)  # half the registers, and what dv is made of
            dv = add_matmul(dv, (left(weights, operand), cotangent), interpret=interpret)
            dweights = matmul(shape, (value, cotangent.transpose((1, 0))))
            at.free(1)
            delta = over(plgpu.load(delta, layout=COLUMNS), shape, 1)
            dlogits = (weights.astype(jnp.float32) * (dweights - delta)).astype(q.dtype)
            dk = add_matmul(dk, (left(dlogits, operand), query), interpret=interpret)
            at.free(0)
            return dk, dv

        zero = constant(0.0, (HEIGHT, dim))
        dk, dv = loop(step, (zero, zero))
        for ref, value in zip(outputs, (dk * scale, dv), strict=True):
            ref = ref.at[index[3]] if splits > 1 else ref
            store(result, value, part(ref, *index[:3], HEIGHT))

    dtype = jnp.float32 if splits > 1 else k.dtype
    lead = (splits,) if splits > 1 else ()
    dk, dv = run(
        sweep, body, (k, v, *ids[1]), ((q, lse, delta, *ids[0]), (dout,)), operand=q.dtype,
        out=[shared((WARPGROUPS, HEIGHT, dim), dtype)],
        out_type=(jax.ShapeDtypeStruct((*lead, *k.shape), dtype),) * 2,
    )  # fmt: skip
    return [jnp.sum(x, axis=0).astype(k.dtype) if splits > 1 else x for x in (dk, dv)]


def _products(shape: tuple[int, int], *pairs) -> tuple[jax.Array, ...]:
    """a @ b for each of several pairs, all on their way at once."""

    def run(*accumulators):
        for acc, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accumulators)

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for _ in pairs))


def _band(causal: bool, window: Window, queries: int) -> Band:
    before, after = (None, None) if window is None else (min(x, queries) for x in window)
    return Band(before, 0 if causal else after)


def _ids(segments, keys, queries: int) -> tuple[tuple, tuple]:
    """Numbers of queries ([B,T],) and of keys ([B,S],) that must agree; () and () for no mask."""
    if segments is None and keys is None:
        return (), ()
    if segments is None:
        segments = jnp.zeros((keys.shape[0], queries), jnp.int32)
        theirs = jnp.zeros(keys.shape, jnp.int32)
    else:
        segments = theirs = segments.astype(jnp.int32)
    if keys is not None:
        theirs = jnp.where(keys, theirs, jnp.iinfo(jnp.int32).min)
    return (segments,), (theirs,)


def _numbers(references: list) -> jax.Array | None:
    """The numbers of this warpgroup's rows, where `_ids` gave any."""
    return plgpu.load(references[0], layout=ROWS) if references else None


def _span(tiles: int, heads: int, window: Window) -> int:
    """Tiles of a block of threads: several of a window's few steps, but no processor idle."""
    return 1 if window is None else max(1, min(8, tiles * heads // (4 * PROCESSORS)))
