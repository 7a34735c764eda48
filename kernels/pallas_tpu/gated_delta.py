"""The gated delta rule on TPU: the kernels of `kernels.fused.gated_delta`.

A step of the grid is a chunk of some heads; chunks run in order, while the heads' states stay in
VMEM. Widths are filled up to whole lanes. A chunk is solved by the inverse of its triangular system
(`kernels.gated_delta_rule`), which is made and applied in float32, beside bfloat16 inputs to 16
bits; operands of other products have the inputs' dtype, sums are float32. The gradient first runs
forward again, and writes what each chunk begins with and its inverse.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.fused.ways import Ways
from kernels.pallas_tpu.carried import begin, by_block, finish
from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.linear_body import (
    Vectors,
    dot,
    factors_of,
    in_two,
    lanes_of,
    places,
    product,
    row_sums,
    times,
    whole_product,
)
from kernels.pallas_tpu.linear_plan import (
    Plan,
    by_chunk,
    call,
    f32,
    joined,
    lines,
    make_plan,
    rows_of,
    tokens,
    ways_in,
    wide,
)

LARGEST = 512
"""The most channels of a head."""
CHUNK = 128
"""Tokens of a chunk."""
BESIDE = 4
"""The most heads of a step, which fill each other's waits; `LARGEST` channels together."""


def refuse(q, k, v) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {v.dtype}: cast q, k and v"
    if max(q.shape[3], v.shape[3]) > LARGEST:
        widths = f"{q.shape[3]} and {v.shape[3]}"
        return f"heads have {widths} channels, the TPU kernels take {LARGEST}: use backend='xla'"
    return None


def forward(q, k, v, ways: Ways, beta, *, state, interpret=None):
    """See `kernels.fused.gated_delta`."""
    plan, arrays = _planned(ways, q=q, k=k, v=v)

    def body(at):
        begin(at)
        outs, systems = [], _systems(plan, at)
        for a, inverse in enumerate(_inverses(plan, systems)):
            here = _solved(plan, at, a, systems[a], inverse, at.memory[a])
            q, weights = lanes_of(plan, at.q[...], a), _weights(plan, at, a, systems[a])
            read = product(q, here.held.astype(q.dtype), 1, 0)
            inside = product(weights.astype(q.dtype), here.change.astype(q.dtype), 1, 0)
            outs.append(inside + systems[a].vectors.col("start") * read)
            at.memory[a] = _absorbed(here)
        at.out[...] = jnp.concatenate(outs, axis=1).astype(at.out.dtype)
        finish(at, plan)

    ins = _ins(plan, arrays, ways, beta) | _state_in(plan, state)
    outs = {"out": wide(plan, v.dtype, plan.dim)} | _state_out(plan)
    made = call(body, plan, ins, outs, scratch=_scratch(plan), interpret=interpret)
    return _heads(plan, made["out"], v.shape[3]), _state_of(plan, made, q, v)


def backward(q, k, v, ways: Ways, beta, *, dout, state, dstate, interpret=None):
    """See `kernels.fused.gated_delta`."""
    plan, arrays = _planned(ways, q=q, k=k, v=v, dout=dout)
    ins = _ins(plan, arrays, ways, beta)
    again = _again(plan, ins, state, interpret)
    last = _state_of(plan, again, q, v)
    by_chunks = {name: by_chunk(plan, again[name]) for name in ("before", "inverse")}

    def body(at):
        begin(at)
        grads = []
        for a, system in enumerate(_systems(plan, at)):
            *wide_ones, dbeta, passed = _grads(plan, at, a, system)
            grads.append(wide_ones)
            at.dbeta[a, 0], at.passed[a, 0] = jnp.transpose(dbeta), jnp.transpose(passed)
        for ref, parts in zip((at.dq, at.dk, at.dv), zip(*grads, strict=True), strict=True):
            ref[...] = jnp.concatenate(parts, axis=1).astype(ref.dtype)
        finish(at, plan)

    wanted = {"dq": q, "dk": k, "dv": v}
    outs = {name: wide(plan, x.dtype, _whole(x.shape[3])) for name, x in wanted.items()}
    outs |= {"dbeta": rows_of(plan), "passed": rows_of(plan)}
    made = call(
        body, plan._replace(backwards=True),
        ins | by_chunks | _state_in(plan, dstate),
        outs | _state_out(plan), scratch=_scratch(plan), interpret=interpret,
    )  # fmt: skip
    dq, dk, dv = (_heads(plan, made[name], x.shape[3]) for name, x in wanted.items())
    rows = joined(made["dbeta"]), joined(made["passed"])
    return dq, dk, dv, *rows, _state_of(plan, made, q, v), last


def _again(plan: Plan, ins, state, interpret) -> dict[str, jax.Array]:
    """The state before each chunk [B,H,N,R,Dv], its inverse [B,H,N,C,C], and what is left."""

    def body(at):
        begin(at)
        systems = _systems(plan, at)
        for a, inverse in enumerate(_inverses(plan, systems)):
            here = _solved(plan, at, a, systems[a], inverse, at.memory[a])
            at.before[a, 0], at.inverse[a, 0] = here.held, here.inverse
            at.memory[a] = _absorbed(here)
        finish(at, plan)

    chunks = plan.batch, plan.heads, plan.grid[2]
    shapes = {"before": (plan.depth, plan.dim), "inverse": (plan.chunk, plan.chunk)}
    outs = {
        name: by_chunk(plan, jax.ShapeDtypeStruct((*chunks, *shape), f32))
        for name, shape in shapes.items()
    }
    ins = {name: x for name, x in ins.items() if name not in ("q", "dout")}
    ins |= _state_in(plan, state)
    return call(
        body, plan, ins, outs | _state_out(plan), scratch=_scratch(plan), interpret=interpret
    )


class _System(NamedTuple):
    """What a head's chunk has to solve, float32 but for the keys: (I + A) change = beta wrong, A =
    beta <k_i, k_j> within_ij. within: what of key j is left when i > j meets it.
    """

    vectors: Vectors
    k: jax.Array
    beta: jax.Array
    within: jax.Array
    products: jax.Array


class _Chunk(NamedTuple):
    """A head's solved chunk. held: the state before; wrong: values less what is held under their
    keys; change: what every token really writes.
    """

    system: _System
    inverse: jax.Array
    held: jax.Array
    wrong: jax.Array
    change: jax.Array


def _systems(plan: Plan, at) -> list[_System]:
    """Those of every head of a step."""
    made = []
    i, j = places(plan.chunk)
    for a in range(plan.packed):
        vectors, k = Vectors(plan, at, a, 0, False), lanes_of(plan, at.k[...], a)
        within = jnp.where(vectors.seen() & (i > j), vectors.within(), 0.0)
        made.append(_System(vectors, k, factors_of(at, a), within, product(k, k, 1, 1)))
    return made


def _inverses(plan: Plan, systems: list[_System]) -> list[jax.Array]:
    """(I + A)^-1 of every system, in turns: the steps of one wait for each other.

    The blocks of `kernels.gated_delta_rule.unit_lower_inverse`, those of one size in one matrix.
    """
    i, j = places(plan.chunk)
    apart, half, like = i ^ j, 2, systems[0].k
    given = [x.beta * x.products * x.within for x in systems]
    made = [jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -x, 0.0)) for x in given]
    while half < plan.chunk:
        there = (apart >= half) & (apart < 2 * half)
        low = [
            _precise(y, jnp.where(there, x, 0.0), 1, like) for x, y in zip(given, made, strict=True)
        ]
        made = [y - _precise(x, y, 1, like) for x, y in zip(low, made, strict=True)]
        half *= 2
    return made


def _solved(plan: Plan, at, a: int, system: _System, inverse, held) -> _Chunk:
    """Head a's chunk after the state `held`."""
    k, v = system.k, lanes_of(plan, at.v[...], a).astype(f32)
    wrong = v - system.vectors.col("start") * product(k, held.astype(k.dtype), 1, 0)
    return _Chunk(system, inverse, held, wrong, _precise(inverse, system.beta * wrong, 1, k))


def _precise(x, y, i: int, like):
    """float32 x times y, over dimension i of x; beside bfloat16 inputs to 16 bits, by products of
    what the numbers are rounded to and of what that leaves.
    """
    if like.dtype == f32:
        return product(x, y, i, 0)
    (x, dx), (y, dy) = (in_two(part, like.dtype) for part in (x, y))
    return product(x, y, i, 0) + (product(x, dy, i, 0) + product(dx, y, i, 0))


def _weights(plan: Plan, at, a: int, system: _System):
    """<q_i, k_j> with what is left of it, 0 where i does not see j."""
    weights = product(lanes_of(plan, at.q[...], a), system.k, 1, 1) * system.vectors.within()
    return jnp.where(system.vectors.seen(), weights, 0.0)


def _absorbed(here: _Chunk):
    """The state after a chunk."""
    vectors, k = here.system.vectors, here.system.k
    new = product(times(vectors.col("end"), k), here.change.astype(k.dtype), 0, 0)
    return vectors.keep() * here.held + new


def _grads(plan: Plan, at, a: int, system: _System):
    """dq, dk, dv, dbeta and, of what fades on its way, read less written; the state's gradient is
    brought to the chunk's beginning.
    """
    q, dout = (lanes_of(plan, x[...], a) for x in (at.q, at.dout))
    here, dheld = _solved(plan, at, a, system, at.inverse[a, 0], at.before[a, 0]), at.memory[a]
    vectors, k, beta, dtype = system.vectors, system.k, system.beta, q.dtype
    start, end, seen = vectors.col("start"), vectors.col("end"), vectors.seen()
    after, change = dheld.astype(dtype), here.change.astype(dtype)

    dchange = product(_weights(plan, at, a, system).astype(dtype), dout, 0, 0)
    dchange += product(times(end, k), after, 1, 0)
    dwrong = _precise(here.inverse, dchange, 0, k)
    dv = beta * dwrong
    dsystem = -product(dwrong.astype(dtype), change, 1, 1) * system.within
    by_keys = (beta * dsystem).astype(dtype)  # the gradients of <k_i, k_j>, and of <q_i, k_j>
    by_queries = jnp.where(seen, product(dout, change, 1, 1) * vectors.within(), 0.0).astype(dtype)

    dq, asked = _sum(q, product(by_queries, k, 1, 0), start, dout, here.held)
    read, known = _sum(k, product(by_keys, k, 1, 0), start, -dv.astype(dtype), here.held)
    inside = product(by_keys, k, 0, 0) + product(by_queries, q, 0, 0)
    written, used = _sum(k, inside, end, change, dheld)
    dbeta = row_sums(dwrong * here.wrong) + row_sums(dsystem * system.products)
    passed = asked + known - used
    at.memory[a] = (
        vectors.keep() * dheld
        + product(times(start, q), dout, 0, 0)
        - product(times(start, k), dv.astype(dtype), 0, 0)
    )
    return dq, read + written, dv, dbeta, passed


def _sum(x, inside, factor, y, state):
    """dx = inside + factor y state^T, and <x, dx> [C, 1]; see `linear_body.dot`."""
    outside = whole_product(y, state, 1, 1)
    return inside + factor * outside, dot(x, inside, factor, outside)


def _planned(ways: Ways, **arrays):
    """The plan of a call, and its arrays with every head's channels filled up to whole lanes."""
    filled = {name: _fill(x, 3) for name, x in arrays.items()}
    plan = make_plan(tuple(filled[n] for n in "qkv"), None, CHUNK, ways)
    room = max(1, min(BESIDE, LARGEST // max(plan.depth, plan.dim)))
    return plan._replace(packed=math.gcd(plan.heads, room)), filled


def _whole(channels: int) -> int:
    """As many channels, filled up to whole lanes."""
    return -(-channels // LANES) * LANES


def _fill(x, *axes: int):
    """Zeros behind, up to whole lanes."""
    return jnp.pad(x, [(0, _whole(n) - n if i in axes else 0) for i, n in enumerate(x.shape)])


def _ins(plan: Plan, arrays, ways: Ways, beta):
    return tokens(plan, **arrays) | ways_in(plan, ways) | lines(plan, beta=beta)


def _heads(plan: Plan, x, channels: int):
    """[B,T,H channels] as [B,T,H,D], what was filled up taken away."""
    return x.reshape(*x.shape[:2], plan.heads, -1)[..., :channels]


def _state_in(plan: Plan, state):
    """[B,H,R,Dv] as [B,blocks,heads of a block,R,Dv] of whole lanes."""
    if state is None:
        return {}
    state = _fill(state, 2, 3)
    return {"state": by_block(state.reshape(plan.batch, *_blocks(plan), *state.shape[2:]))}


def _state_out(plan: Plan):
    shape = (plan.batch, *_blocks(plan), plan.depth, plan.dim)
    return {"left": by_block(jax.ShapeDtypeStruct(shape, f32))}


def _state_of(plan: Plan, made, q, v):
    left = made["left"].reshape(plan.batch, plan.heads, plan.depth, plan.dim)
    return left[:, :, : q.shape[3], : v.shape[3]]


def _blocks(plan: Plan) -> tuple[int, int]:
    return plan.grid[1], plan.packed


def _scratch(plan: Plan):
    """The states between chunks."""
    return {"memory": pltpu.VMEM((plan.packed, plan.depth, plan.dim), f32)}
