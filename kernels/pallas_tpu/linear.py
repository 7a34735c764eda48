"""Linear attention on TPU: the kernels of `kernels.fused.linear`.

A step of the grid is a chunk of one block of heads; chunks run in order, while S and z stay in
VMEM. Heads lie side by side in the channels, [B, T, heads x D]: a block is 128 lanes or a multiple,
so that heads of 64 or 32 channels go together, two or four to a block. A head is taken out of its
block by setting the other lanes to 0, not by moving lanes: on a matrix unit 128 wide that costs
nothing. Its S has the rows and lanes of the whole block; lanes that are not its own are dropped.

Operands of matrix products have the inputs' dtype, sums are float32; float32 operands are
multiplied as such (six passes of bfloat16). Numbers per token come eight to a chunk (`VECTORS`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.fused.passes import Projection
from kernels.pallas_tpu.linear_body import (
    Vectors,
    absorb,
    added,
    begin,
    chosen,
    factors_of,
    features,
    finish,
    gathered,
    head_of,
    inverse_of,
    lanes_of,
    logits_of,
    product,
    through,
    times,
)
from kernels.pallas_tpu.linear_plan import (
    LANES,
    Plan,
    beside,
    call,
    f32,
    joined,
    lines,
    make_plan,
    packed_heads,
    rows_of,
    sizes_of,
    state_in,
    state_of,
    state_out,
    state_scratch,
    tokens,
    ways_in,
    weight_in,
    wide,
)

SHIFTS_QUERIES = False
CHUNKS = (1024, 512, 256, 128)
LARGEST = 512
"""The most features or channels of a head, and of the heads of a block together twice as many."""
PACKED = 8
"""The most heads of a block."""


def refuse(q, k, v, *, rank: int | None = None) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {v.dtype}: cast q, k and v"
    heads = max(x.shape[2] for x in (q, k, v))
    widths = {q.shape[3], v.shape[3], rank or 0}
    packed = packed_heads(heads, q.shape[3], v.shape[3])
    if max(widths) > LARGEST:
        return f"the TPU kernels hold up to {LARGEST} channels or features: use backend='xla'"
    if packed > PACKED or packed * max(q.shape[3], v.shape[3]) > 2 * LARGEST:
        return (
            f"{heads} heads of {q.shape[3]} and {v.shape[3]} channels do not come in blocks of "
            f"{LANES} lanes: use a head_dim that divides {LANES}, or backend='xla'"
        )
    return None


def chunk_length(length: int, *, rank: int, dim: int) -> int:
    """Tokens of a chunk: as many as there is room for where that fills up no more than less."""
    room = [c for c in CHUNKS if c <= sizes_of(rank, dim).chunk]
    return min(room, key=lambda c: (-(-length // c) * c, -c))


def log_scale(x, weight, half: float, *, interpret=None):
    """max_r <x, w_r> - half |x|^2 [B,H,T] of x [B,T,H,D], with no array of T x R written out."""
    projection = Projection(weight, half, None, x)  # no shift is read
    plan = make_plan((x,), projection, chunk_length(x.shape[1], rank=1, dim=1))

    def body(at):
        for a in range(plan.packed):
            x = head_of(plan, at.x[...], a)
            top = jnp.max(logits_of(x, at.weight), axis=1, keepdims=True)
            square = jnp.sum(jnp.square(x.astype(f32)), axis=1, keepdims=True)
            at.top[a] = jnp.transpose(top - half * square)

    made = call(
        body, plan, tokens(plan, x=x) | weight_in(plan, projection, x), {"top": rows_of(plan)},
        interpret=interpret,
    )  # fmt: skip
    return joined(made["top"])


def forward(q, k, v, ways, *, state, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = make_plan((q, k, v), projection, chunk, ways)
    if ways is None and projection is None:
        plan = plan._replace(packed=max(plan.packed, beside(plan.heads, (q, k, v))))

    def body(at):
        begin(at, plan)
        heads = range(plan.packed)  # a stage of all, then the next: they fill each other's waits
        vectors = [Vectors(plan, at, a, False) for a in heads]
        v = [lanes_of(plan, at.v[...], a) for a in heads]
        q, k = ([features(plan, at, name, a) for a in heads] for name in "qk")
        weights = [product(q[a], k[a], 1, 1) for a in heads]
        read = [product(q[a], at.sums[a].astype(v[a].dtype), 1, 0) for a in heads]
        for a in heads:
            weights[a] = jnp.where(vectors[a].seen(), weights[a] * vectors[a].within(), 0.0)
        outs = [product(weights[a].astype(v[a].dtype), v[a], 1, 0) for a in heads]
        for a in heads:
            start = vectors[a].col("start")
            outs[a] += start * read[a]
            if normalise:
                den = jnp.sum(q[a].astype(f32) * at.norm[a], axis=1, keepdims=True)
                den = jnp.sum(weights[a], axis=1, keepdims=True) + start * den
                at.den[a] = jnp.transpose(den)
                outs[a] *= inverse_of(den)
            entering = times(vectors[a].col("end"), k[a])
            absorb(at, a, vectors[a].keep(), entering, v[a], normalise)
        at.out[...] = chosen(plan, outs).astype(at.out.dtype)
        finish(at, plan)

    ins = tokens(plan, q=q, k=k, v=v) | ways_in(plan, ways) | weight_in(plan, projection, q)
    outs: dict[str, Any] = {"out": wide(plan, v.dtype, plan.dim)}
    if normalise:
        outs["den"] = rows_of(plan)
    made = call(
        body, plan, ins | state_in(plan, state), outs | state_out(plan),
        scratch=state_scratch(plan), interpret=interpret,
    )  # fmt: skip
    out = made["out"].reshape(*q.shape[:2], plan.heads, plan.dim)
    return out, joined(made["den"]) if normalise else None, state_of(plan, made)


def backward(
    q, k, v, ways, *,
    dout, inv_den, r, state, dstate, projection, normalise: bool, chunk: int, interpret=None,
):  # fmt: skip
    """See `kernels.fused.linear`; q_dq is None where q is not read: normalised, no projection."""
    plan = make_plan((q, k, v), projection, chunk, ways)
    given = ways_in(plan, ways, inv_den, r) if normalise else ways_in(plan, ways)
    given |= weight_in(plan, projection, q)
    reads_q = projection is not None or not normalise
    arrays = {"q": q, "k": k, "v": v, "dout": dout}
    how = {"given": given, "normalise": normalise, "interpret": interpret}
    first = _query_grads(plan, arrays, state=state, reads_q=reads_q, **how)
    second = _key_grads(plan._replace(backwards=True), arrays, dstate=dstate, **how)
    dq, dk, dv = (x.reshape(*q.shape[:2], plan.heads, -1) for x in
                  (first["dq"], second["dk"], second["dv"]))  # fmt: skip
    q_dq = joined(first["q_dq"]) if reads_q else None
    return dq, dk, dv, q_dq, joined(second["k_dk"]), state_of(plan, second)


def _query_grads(
    plan: Plan, arrays, *, given, state, normalise: bool, reads_q: bool, interpret
) -> dict[str, jax.Array]:
    """dq, chunks in order, S and z made again; q_dq too, where q is read."""

    def queries(at):
        begin(at, plan)
        dq = []
        for a in range(plan.packed):
            vectors, v = Vectors(plan, at, a, normalise), lanes_of(plan, at.v[...], a)
            k, dout = features(plan, at, "k", a), head_of(plan, at.dout[...], a)
            within = product(dout, v, 1, 1) * vectors.col("inv_den") + vectors.col("r")
            within = jnp.where(vectors.seen(), within * vectors.within(), 0.0).astype(v.dtype)
            read = product(dout, at.sums[a].astype(v.dtype), 1, 1) * vectors.col("inv_den")
            if normalise:
                read += vectors.col("r") * at.norm[a]
            dphi = product(within, k, 1, 0) + vectors.col("start") * read
            if reads_q:
                phi = features(plan, at, "q", a).astype(f32)
                dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
                at.q_dq[a] = jnp.transpose(dot)
                dphi = through(plan, at, lanes_of(plan, at.q[...], a), phi, dphi, dot)
            dq.append(dphi)
            entering = times(vectors.col("end"), k)
            absorb(at, a, vectors.keep(), entering, v, normalise)
        at.dq[...] = gathered(plan, dq).astype(at.dq.dtype)

    there = arrays if reads_q else {name: x for name, x in arrays.items() if name != "q"}
    q = arrays["q"]
    outs: dict[str, Any] = {"dq": wide(plan, q.dtype, q.shape[3])}
    if reads_q:
        outs["q_dq"] = rows_of(plan)
    return call(
        queries, plan, tokens(plan, **there) | given | state_in(plan, state), outs,
        scratch=state_scratch(plan), interpret=interpret,
    )  # fmt: skip


def _key_grads(
    plan: Plan, arrays, *, given, dstate, normalise: bool, interpret
) -> dict[str, jax.Array]:
    """dk, dv, k_dk and the gradient of the first state, the last chunk first."""

    def keys(at):
        begin(at, plan)
        dk, dv = [], []
        for a in range(plan.packed):
            vectors, v = Vectors(plan, at, a, normalise), lanes_of(plan, at.v[...], a)
            q, k = (features(plan, at, name, a) for name in "qk")
            dout, inverse = head_of(plan, at.dout[...], a), vectors.line("inv_den")
            seen, within = vectors.seen_back(), vectors.within_back()
            weights = jnp.where(seen, product(k, q, 1, 1) * within * inverse, 0.0)
            end, held = vectors.col("end"), at.sums[a].astype(v.dtype)
            dv.append(product(weights.astype(v.dtype), dout, 1, 0) + end * product(k, held, 1, 0))
            grads = (product(v, dout, 1, 1) * inverse + vectors.line("r")) * within
            grads = jnp.where(seen, grads, 0.0).astype(v.dtype)
            read = product(v, held, 1, 1)
            if normalise:
                read += at.norm[a]
            dphi = product(grads, q, 1, 0) + end * read
            phi = k.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            at.k_dk[a] = jnp.transpose(dot)
            dk.append(through(plan, at, lanes_of(plan, at.k[...], a), phi, dphi, dot))
            keep, start = vectors.keep(), vectors.col("start")
            reading = times(start * vectors.col("inv_den"), q)
            at.sums[a] = keep * at.sums[a] + product(reading, dout, 0, 0)
            if normalise:
                total = start * vectors.col("r") * q.astype(f32)
                at.norm[a] = keep * at.norm[a] + jnp.sum(total, axis=0, keepdims=True)
        at.dk[...] = gathered(plan, dk).astype(at.dk.dtype)
        at.dv[...] = added(plan, dv).astype(at.dv.dtype)
        finish(at, plan)

    k, v = arrays["k"], arrays["v"]
    outs = {
        "dk": wide(plan, k.dtype, k.shape[3]), "dv": wide(plan, v.dtype, plan.dim),
        "k_dk": rows_of(plan),
    }  # fmt: skip
    return call(
        keys, plan, tokens(plan, **arrays) | state_in(plan, dstate) | given,
        outs | state_out(plan), scratch=state_scratch(plan), interpret=interpret,
    )  # fmt: skip


def sums(k, v, *, end, fill=None, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = make_plan((k, v), projection, chunk)

    def body(at):
        begin(at, plan)
        for a in range(plan.packed):
            k, v = features(plan, at, "k", a), lanes_of(plan, at.v[...], a)
            at.sums[a] += product(times(factors_of(at, a), k), v, 0, 0)
            at.norm[a] += jnp.sum(factors_of(at, a, 1) * k.astype(f32), axis=0, keepdims=True)
        finish(at, plan)

    ins = tokens(plan, k=k, v=v) | lines(plan, end=end, fill=fill)
    ins |= weight_in(plan, projection, k)
    made = call(body, plan, ins, state_out(plan), scratch=state_scratch(plan), interpret=interpret)
    return state_of(plan, made)


def read(q, sums, norm, *, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    values = jax.ShapeDtypeStruct((*q.shape[:2], sums.shape[1], sums.shape[3]), q.dtype)
    plan = make_plan((q, values), projection, chunk)

    def body(at):
        outs = []
        for a in range(plan.packed):
            q = features(plan, at, "q", a)
            num = product(q, at.state_sums[a].astype(q.dtype), 1, 0)
            if normalise:
                den = jnp.sum(q.astype(f32) * at.state_norm[a], axis=1, keepdims=True)
                at.den[a] = jnp.transpose(den)
                num *= inverse_of(den)
            outs.append(num)
        at.out[...] = chosen(plan, outs).astype(at.out.dtype)

    ins = tokens(plan, q=q) | weight_in(plan, projection, q) | state_in(plan, (sums, norm))
    outs: dict[str, Any] = {"out": wide(plan, q.dtype, plan.dim)}
    if normalise:
        outs["den"] = rows_of(plan)
    made = call(body, plan, ins, outs, interpret=interpret)
    out = made["out"].reshape(*q.shape[:2], plan.heads, plan.dim)
    return out, joined(made["den"]) if normalise else None


def read_backward(q, sums, norm, *, dout, inv_den, r, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = make_plan((q, dout), projection, chunk)

    def body(at):
        begin(at, plan, given=False)
        dq = []
        for a in range(plan.packed):
            q, dout = features(plan, at, "q", a), head_of(plan, at.dout[...], a)
            inverse, r = factors_of(at, a), factors_of(at, a, 1)
            read = product(dout, at.state_sums[a].astype(q.dtype), 1, 1)
            dphi, phi = read * inverse + r * at.state_norm[a], q.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            dq.append(through(plan, at, lanes_of(plan, at.q[...], a), phi, dphi, dot))
            at.sums[a] += product(times(inverse, q), dout, 0, 0)
            at.norm[a] += jnp.sum(r * phi, axis=0, keepdims=True)
        at.dq[...] = gathered(plan, dq).astype(at.dq.dtype)
        finish(at, plan)

    ins = tokens(plan, q=q, dout=dout) | lines(plan, inv_den=inv_den, r=r)
    ins |= weight_in(plan, projection, q) | state_in(plan, (sums, norm))
    outs = {"dq": wide(plan, q.dtype, q.shape[3])} | state_out(plan)
    made = call(body, plan, ins, outs, scratch=state_scratch(plan), interpret=interpret)
    return made["dq"].reshape(*q.shape[:2], plan.heads, -1), state_of(plan, made)


def sums_backward(k, v, dsums, dnorm, *, end, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = make_plan((k, v), projection, chunk)

    def body(at):
        dk, dv = [], []
        for a in range(plan.packed):
            k, v, end = features(plan, at, "k", a), lanes_of(plan, at.v[...], a), factors_of(at, a)
            held = at.state_sums[a].astype(v.dtype)
            dv.append(end * product(k, held, 1, 0))
            dphi, phi = end * (product(v, held, 1, 1) + at.state_norm[a]), k.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            at.k_dk[a] = jnp.transpose(dot)
            dk.append(through(plan, at, lanes_of(plan, at.k[...], a), phi, dphi, dot))
        at.dk[...] = gathered(plan, dk).astype(at.dk.dtype)
        at.dv[...] = added(plan, dv).astype(at.dv.dtype)

    ins = tokens(plan, k=k, v=v) | lines(plan, end=end) | weight_in(plan, projection, k)
    outs = {
        "dk": wide(plan, k.dtype, k.shape[3]), "dv": wide(plan, v.dtype, plan.dim),
        "k_dk": rows_of(plan),
    }  # fmt: skip
    made = call(body, plan, ins | state_in(plan, (dsums, dnorm)), outs, interpret=interpret)
    dk, dv = (made[x].reshape(*k.shape[:2], plan.heads, -1) for x in ("dk", "dv"))
    return dk, dv, joined(made["k_dk"])
