"""Linear attention that fades by channel, on TPU: the kernels of `kernels.fused.gated_linear`.

A step of the grid is a chunk of some heads; chunks run in order, while the heads' states stay in
VMEM, transposed: decays lie along lanes, as keys do. Heads lie side by side in the channels, those
that share a block of 128 lanes as in `kernels.pallas_tpu.linear`; their states are the blocks on
the diagonal of one.

Inside a chunk a pair i > j belongs to the level whose `half` is the highest bit of i ^ j: j lies in
the first, i in the second half of 2 half neighbours, and what fades on the way is that from j to
the middle times that from the middle to i (the blocks of GLA, arXiv 2312.06635, section 4.3, down
to single tokens). So each level is one product of matrices, every exponent is a sum of log decays
over the tokens in between, at most 0, and no sum is taken from another: decays of 0, even -inf for
their logarithms, are as exact as any.

Operands of products have the inputs' dtype, sums are float32; float32 operands are multiplied as
such. Both passes of the gradient multiply by the same rounded numbers, so that of the decays' two
sums over pairs, which are subtracted, what cancels cancels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.carried import begin, by_block, finish
from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.gated_plan import (
    LARGEST,
    blocks_of,
    chunk_length,
    heads_of,
    plan_of,
    scratch,
    state_in,
    state_of,
    state_out,
    units,
)
from kernels.pallas_tpu.linear_body import (
    chosen,
    head_of,
    lanes_of,
    places,
    product,
    times,
    whole_product,
)
from kernels.pallas_tpu.linear_plan import Plan, call, f32, packed_heads, tokens, wide

__all__ = ["backward", "chunk_length", "forward", "refuse"]


def refuse(q, k, v) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {v.dtype}: cast q, k and v"
    heads, depth, dim = v.shape[2], q.shape[3], v.shape[3]
    shared = packed_heads(heads, depth, dim)
    if shared * max(depth, dim) > LARGEST:
        return (
            f"{heads} heads of {depth} and {dim} channels do not come in blocks of {LANES} to "
            f"{LARGEST} lanes: use widths that divide {LANES}, or backend='xla'"
        )
    return None


def forward(q, k, v, log_decay, *, state, chunk: int, interpret=None):
    """See `kernels.fused.gated_linear`."""
    plan = plan_of((q, k, v), chunk)

    def body(at):
        begin(at)
        apart, order = _pairs(chunk)
        outs = []
        for unit in range(units(plan)):
            q, k, v, log_decay = _read(plan, at, unit, "q", "k", "v", "log_decay")
            fading = _fading(log_decay)
            held = at.memory[unit]
            inside = [
                product(jnp.where(order >= 0, weights, 0.0).astype(v.dtype), v, 1, 0)
                for weights in _weights(plan, unit, apart, fading, q, k)
            ]
            read = product(times(fading.start, q), held.astype(v.dtype), 1, 1)
            outs.append(chosen(plan, inside) + read)
            at.memory[unit] = _absorbed(plan, held, fading, v, times(fading.end, k))
        at.out[...] = jnp.concatenate(outs, axis=1).astype(at.out.dtype)
        finish(at, plan)

    ins = tokens(plan, q=q, k=k, v=v, log_decay=log_decay) | state_in(plan, state)
    outs = {"out": wide(plan, v.dtype, plan.dim)} | state_out(plan)
    made = call(body, plan, ins, outs, scratch=scratch(plan), interpret=interpret)
    return made["out"].reshape(*v.shape[:2], plan.heads, plan.dim), state_of(plan, made["left"])


def backward(q, k, v, log_decay, *, dout, state, dstate, crossing, chunk: int, interpret=None):
    """See `kernels.fused.gated_linear`."""
    plan = plan_of((q, k, v), chunk)
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "dout": dout}
    first = _query_grads(plan, arrays, state=state, interpret=interpret)
    q_dq = first["q_dq"].reshape(*q.shape[:2], plan.heads, -1)
    second = _key_grads(
        plan._replace(backwards=True), arrays | {"q_dq": q_dq}, dstate=dstate, crossing=crossing,
        interpret=interpret,
    )  # fmt: skip
    grads = (first["dq"], second["dk"], second["dv"], second["dlog_decay"])
    made = (x.reshape(*q.shape[:2], plan.heads, -1) for x in grads)
    return (*made, state_of(plan, second["left"]))


def _query_grads(plan: Plan, arrays, *, state, interpret) -> dict[str, jax.Array]:
    """dq and q dq by channel, without the diagonal's part; chunks in order, states made again."""

    def queries(at):
        begin(at)
        apart, order = _pairs(plan.chunk)
        grads = []
        for unit in range(units(plan)):
            q, k, v, log_decay, dout = _read(plan, at, unit, "q", "k", "v", "log_decay", "dout")
            fading, held = _fading(log_decay), at.memory[unit]
            pairs = [
                jnp.where(order >= 0, product(_alone(plan, dout, a), v, 1, 1), 0.0)
                for a in heads_of(plan, unit)
            ]
            read = whole_product(dout, held, 1, 0)
            dq = _through(plan, pairs, apart == 0, k) + fading.start * read
            q_dq = times(fading.start, q).astype(f32) * read
            for level in fading.levels:
                part = _through(plan, pairs, level.has(apart), times(level.left, k))
                dq += level.left * part
                q_dq += times(level.left, q).astype(f32) * part
            grads.append((dq, q_dq))
            at.memory[unit] = _absorbed(plan, held, fading, v, times(fading.end, k))
        for ref, parts in zip((at.dq, at.q_dq), zip(*grads, strict=True), strict=True):
            ref[...] = jnp.concatenate(parts, axis=1).astype(ref.dtype)

    q = arrays["q"]
    outs = {"dq": wide(plan, q.dtype, plan.depth), "q_dq": wide(plan, f32, plan.depth)}
    ins = tokens(plan, **arrays) | state_in(plan, state)
    return call(queries, plan, ins, outs, scratch=scratch(plan), interpret=interpret)


def _key_grads(plan: Plan, arrays, *, dstate, crossing, interpret) -> dict[str, jax.Array]:
    """dk, dv, those of the decays and of the first state; the last chunk first."""

    def keys(at):
        begin(at)
        begin(at, "rest", "crossing")
        apart, order = _pairs(plan.chunk)
        later = (order <= 0).astype(f32)  # [t, i]: i >= t
        grads = []
        for unit in range(units(plan)):
            q, k, v, log_decay, dout, q_dq = _read(
                plan, at, unit, "q", "k", "v", "log_decay", "dout", "q_dq"
            )
            fading, held = _fading(log_decay), at.memory[unit]
            inside = [
                product(jnp.where(order <= 0, weights, 0.0).astype(v.dtype), dout, 1, 0)
                for weights in _weights(plan, unit, apart, fading, k, q)
            ]
            leaving = times(fading.end, k)
            dv = chosen(plan, inside) + product(leaving, held.astype(v.dtype), 1, 1)
            pairs = [
                jnp.where(order <= 0, product(_alone(plan, v, a), dout, 1, 1), 0.0)
                for a in heads_of(plan, unit)
            ]
            read = whole_product(v, held, 1, 0)
            dk = _through(plan, pairs, apart == 0, q) + fading.end * read
            change = q_dq - leaving.astype(f32) * read
            for level in fading.levels:
                part = _through(plan, pairs, level.has(apart), times(level.left, q))
                dk += level.left * part
                change -= times(level.left, k).astype(f32) * part
            rest = at.rest[unit]
            grads.append((dk, dv, product(later, change, 1, 0) + rest))
            at.rest[unit] = rest + jnp.sum(change, axis=0, keepdims=True)
            at.memory[unit] = _absorbed(plan, held, fading, dout, times(fading.start, q))
        refs = at.dk, at.dv, at.dlog_decay
        for ref, parts in zip(refs, zip(*grads, strict=True), strict=True):
            ref[...] = jnp.concatenate(parts, axis=1).astype(ref.dtype)
        finish(at, plan)

    k, v = arrays["k"], arrays["v"]
    outs = {
        "dk": wide(plan, k.dtype, plan.depth), "dv": wide(plan, v.dtype, plan.dim),
        "dlog_decay": wide(plan, f32, plan.depth),
    }  # fmt: skip
    crossing = crossing.reshape(plan.batch, *blocks_of(plan), 1, -1)
    ins = tokens(plan, **arrays) | state_in(plan, dstate) | {"crossing": by_block(crossing)}
    memories = scratch(plan) | {"rest": pltpu.VMEM(crossing.shape[2:], f32)}
    return call(keys, plan, ins, outs | state_out(plan), scratch=memories, interpret=interpret)


class _Level(NamedTuple):
    """Pairs half <= i ^ j < 2 half; `left` from the first half's tokens to the middle, and from
    there to the second half's.
    """

    half: int
    left: jax.Array

    def has(self, apart):
        """The pairs of this level, of those that i ^ j is given of."""
        return (apart >= self.half) & (apart < 2 * self.half)


class _Fading(NamedTuple):
    """What is left, of 1: at every level; from the chunk's start to a token, itself too, and from
    behind it to the chunk's end [C, R]; over the chunk [1, R].
    """

    levels: list[_Level]
    start: jax.Array
    end: jax.Array
    keep: jax.Array


def _fading(log_decay) -> _Fading:
    """Sums over the halves of every level, out of those of the level below."""
    chunk = log_decay.shape[0]
    rows = jax.lax.broadcasted_iota(jnp.int32, log_decay.shape, 0)
    since, until = log_decay, jnp.zeros_like(log_decay)
    levels, half = [], 1
    while half < chunk:
        second = (rows & half) != 0
        levels.append(_Level(half, jnp.exp(jnp.where(second, since, until))))
        total = since + until
        since = since + jnp.where(second, pltpu.roll(total, half, 0), 0.0)
        until = until + jnp.where(second, 0.0, pltpu.roll(total, chunk - half, 0))
        half *= 2
    keep = jnp.exp((since + until)[:1])
    return _Fading(levels, jnp.exp(since), jnp.exp(until), keep)


def _pairs(chunk: int):
    """i ^ j and i - j at [i, j]."""
    i, j = places(chunk)
    return i ^ j, i - j


def _weights(plan: Plan, unit: int, apart, fading: _Fading, rows, cols):
    """<q_i, k_j> with what is left of it, of each head of a unit; of use where i >= j.

    rows, cols: queries and keys, or keys and queries.
    """
    made = [product(_alone(plan, rows, a), cols, 1, 1) for a in heads_of(plan, unit)]
    for level in fading.levels:
        x, y = times(level.left, rows), times(level.left, cols)
        for n, a in enumerate(heads_of(plan, unit)):
            made[n] = jnp.where(apart >= level.half, product(_alone(plan, x, a), y, 1, 1), made[n])
    return made


def _through(plan: Plan, pairs, there, other):
    """The gradients of queries or keys from those of `pairs` that are `there`, of every head."""
    parts = [product(jnp.where(there, x, 0.0).astype(other.dtype), other, 1, 0) for x in pairs]
    return chosen(plan, parts)


def _absorbed(plan: Plan, held, fading: _Fading, values, entering):
    """The state after a chunk, heads that share lanes kept apart."""
    new = product(values, entering, 0, 0)
    if plan.shared > 1:
        value, key = (jax.lax.broadcasted_iota(jnp.int32, new.shape, axis) for axis in (0, 1))
        own = [
            _between(value, a, plan.dim) & _between(key, a, plan.depth) for a in range(plan.shared)
        ]
        new = jnp.where(functools.reduce(jnp.logical_or, own), new, 0.0)
    return fading.keep * held + new


def _between(places, a: int, width: int):
    """The places of head a; no division, which a TPU's vectors lack."""
    return (places >= a * width) & (places < (a + 1) * width)


def _read(plan: Plan, at, unit: int, *names: str):
    return [lanes_of(plan, getattr(at, name)[...], unit) for name in names]


def _alone(plan: Plan, x, a: int):
    """A unit's x, other heads' lanes 0."""
    return head_of(plan, x, a) if plan.shared > 1 else x
