"""Linear attention on TPU: the kernels of `kernels.fused.linear`.

A step of the grid is some chunks of one block of heads; steps run in order, while S and z stay in
VMEM. The heads and chunks of a step go side by side, a stage of all, then the next: each fills the
waits of the others. Heads lie side by side in the channels, [B, T, heads x D]: a block is 128 lanes
or a multiple, so that heads of 64 or 32 channels go together, two or four to a block. A head is
taken out of its block by setting the other lanes to 0, not by moving lanes: on a matrix unit 128
wide that costs nothing. Its S has the rows and lanes of the whole block; lanes that are not its own
are dropped.

Operands of matrix products have the inputs' dtype, sums are float32; float32 operands are
multiplied as such (six passes of bfloat16). Numbers per token come as lines of one (`VECTORS`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.fused.passes import Projection
from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.linear_body import (
    Vectors,
    added,
    begin,
    chosen,
    column_sums,
    dot,
    finish,
    gathered,
    head_of,
    inverse_of,
    lanes_of,
    logits_of,
    passed,
    product,
    row_sums,
    rows,
    staged_features,
    taken,
    through,
    through_quotient,
    times,
    units,
    whole_product,
)
from kernels.pallas_tpu.linear_plan import (
    Plan,
    by_chunk,
    call,
    f32,
    joined,
    packed_heads,
    plan_of,
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
from kernels.pallas_tpu.linear_two_sided import read, read_backward, sums, sums_backward

__all__ = [
    "SHIFTS_QUERIES",
    "backward",
    "chunk_length",
    "forward",
    "log_scale",
    "read",
    "read_backward",
    "refuse",
    "sums",
    "sums_backward",
]

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
    projection = Projection(weight, half, None, None)
    plan = plan_of((x,), projection, chunk_length(x.shape[1], rank=1, dim=1)).whole()

    def body(at):
        for a in range(plan.packed):
            x = head_of(plan, at.x[...], a)
            top = jnp.max(logits_of(x, at.weight), axis=1, keepdims=True)
            square = jnp.sum(jnp.square(x.astype(f32)), axis=1, keepdims=True)
            at.top[a, 0] = jnp.transpose(top - half * square)

    made = call(
        body, plan, tokens(plan, x=x) | weight_in(plan, projection, x), {"top": rows_of(plan)},
        interpret=interpret,
    )  # fmt: skip
    return joined(made["top"])


def forward(q, k, v, ways, *, state, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = plan_of((q, k, v), projection, chunk, ways)

    def body(at):
        begin(at, plan)
        there = units(plan)
        vectors = {u: Vectors(plan, at, *u, False) for u in there}
        v = taken(plan, at, "v", there, lanes_of)
        q, k = (staged_features(plan, at, name, there) for name in "qk")
        weights = {u: product(q[u], k[u], 1, 1) for u in there}
        held = _absorbed(plan, at, vectors, k, v, normalise)
        before = {u: product(q[u], held[u][0].astype(v[u].dtype), 1, 0) for u in there}
        for u in there:
            weights[u] = jnp.where(vectors[u].seen(), weights[u] * vectors[u].within(), 0.0)
        outs = {u: product(weights[u].astype(v[u].dtype), v[u], 1, 0) for u in there}
        for u in there:
            start = vectors[u].col("start")
            outs[u] += start * before[u]
            if normalise:
                den = jnp.sum(q[u].astype(f32) * held[u][1], axis=1, keepdims=True)
                den = jnp.sum(weights[u], axis=1, keepdims=True) + start * den
                at.den[u] = jnp.transpose(den)
                outs[u] *= inverse_of(den)
        _put(plan, at.out, chosen, outs)
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


def _absorbed(plan: Plan, at, vectors, k, v, normalise: bool):
    """S and z that every unit begins with, as keys and values enter them."""
    entering = {u: times(vectors[u].col("end"), k[u]) for u in vectors}
    return passed(
        plan, at, {u: vectors[u].keep() for u in vectors},
        {u: product(entering[u], v[u], 0, 0) for u in vectors},
        {u: column_sums(entering[u]) for u in vectors} if normalise else None,
    )  # fmt: skip


def _put(plan: Plan, ref, gather, parts) -> None:
    """A block out of what was made for each unit; `gather` brings a part's heads together."""
    for n in range(plan.parts):
        block = gather(plan, [parts[a, n] for a in range(plan.packed)])
        ref[rows(plan, n)] = block.astype(ref.dtype)


def backward(
    q, k, v, ways, *,
    dout, inv_den, r, state, dstate, projection, normalise: bool, chunk: int, interpret=None,
):  # fmt: skip
    """See `kernels.fused.linear`; q_dq, which is 0 where it is normalised, and S are None there."""
    plan = plan_of((q, k, v), projection, chunk, ways)
    given = ways_in(plan, ways, inv_den if normalise else None) | weight_in(plan, projection, q)
    arrays = {"q": q, "k": k, "v": v, "dout": dout}
    how = {"normalise": normalise, "interpret": interpret}
    first = _query_grads(plan, arrays, given=given, state=state, **how)
    if normalise:
        given |= {"r": by_chunk(plan, first["r"])}
    turned = plan._replace(backwards=True)
    second = _key_grads(turned, arrays, given=given, dstate=dstate, **how)
    dq, dk, dv = (x.reshape(*q.shape[:2], plan.heads, -1) for x in
                  (first["dq"], second["dk"], second["dv"]))  # fmt: skip
    q_dq, last = (None, None) if normalise else (joined(first["q_dq"]), state_of(plan, first)[0])
    return dq, dk, dv, q_dq, joined(second["k_dk"]), state_of(plan, second), last


def _query_grads(plan: Plan, arrays, *, given, state, normalise: bool, interpret):
    """dq, chunks in order, S and z made again; r or, of what is not normalised, q_dq too."""

    def queries(at):
        begin(at, plan)
        there = units(plan)
        vectors = {u: Vectors(plan, at, *u, normalise) for u in there}
        v = taken(plan, at, "v", there, lanes_of)
        dout = taken(plan, at, "dout", there, head_of)
        q, k = (staged_features(plan, at, name, there) for name in "qk")
        held = _absorbed(plan, at, vectors, k, v, normalise)
        pairs = {u: product(dout[u], v[u], 1, 1) for u in there}
        dq = {}
        for u in there:
            (a, n), here, dtype = u, vectors[u], v[u].dtype
            start, share = here.col("start"), jnp.where(here.seen(), here.within(), 0.0)
            inside = product((pairs[u] * share).astype(dtype), k[u], 1, 0)
            before = _read(dout[u], held[u][0], normalise)
            if normalise:
                norm = product(share.astype(dtype), k[u], 1, 0) + start * held[u][1]
                inverse = here.col("inv_den")
                phi, dphi, r = through_quotient(q[u], inside + start * before, norm, inverse)
                at.r[u] = jnp.transpose(r)
                total = None
            else:
                dphi = inside + start * before
                phi, total = q[u].astype(f32), dot(q[u], inside, start, before)
                at.q_dq[u] = jnp.transpose(total)
            x = lanes_of(plan, at.q[rows(plan, n)], a)
            dq[u] = through(plan, at, x, phi, dphi, total)
        _put(plan, at.dq, gathered, dq)
        if not normalise:
            finish(at, plan)

    q = arrays["q"]
    outs = {"dq": wide(plan, q.dtype, q.shape[3])}
    outs |= {"r": rows_of(plan)} if normalise else {"q_dq": rows_of(plan)} | state_out(plan)
    return call(
        queries, plan, tokens(plan, **arrays) | given | state_in(plan, state), outs,
        scratch=state_scratch(plan), interpret=interpret,
    )  # fmt: skip


def _read(x, state, normalise: bool):
    """What x gets of a state; all of it where decays ask how much that is."""
    return product(x, state.astype(x.dtype), 1, 1) if normalise else whole_product(x, state, 1, 1)


def _key_grads(
    plan: Plan, arrays, *, given, dstate, normalise: bool, interpret
) -> dict[str, jax.Array]:
    """dk, dv, k_dk and the gradient of the first state, the last chunk first."""

    def keys(at):
        begin(at, plan)
        there = units(plan)
        vectors = {u: Vectors(plan, at, *u, normalise) for u in there}
        v = taken(plan, at, "v", there, lanes_of)
        dout = taken(plan, at, "dout", there, head_of)
        q, k = (staged_features(plan, at, name, there) for name in "qk")
        start = {u: vectors[u].col("start") for u in there}
        reading = {u: times(start[u] * vectors[u].col("inv_den"), q[u]) for u in there}
        rest = {u: start[u] * vectors[u].col("r") for u in there} if normalise else {}
        held = passed(
            plan, at, {u: vectors[u].keep() for u in there},
            {u: product(reading[u], dout[u], 0, 0) for u in there},
            {u: column_sums(rest[u] * q[u].astype(f32)) for u in there} if normalise else None,
        )  # fmt: skip
        weights = {u: product(k[u], q[u], 1, 1) for u in there}
        grads = {u: product(v[u], dout[u], 1, 1) for u in there}
        dk, dv = {}, {}
        for u in there:
            here, dtype = vectors[u], v[u].dtype
            seen, within, inverse = here.seen_back(), here.within_back(), here.line("inv_den")
            weight = jnp.where(seen, weights[u] * within * inverse, 0.0).astype(dtype)
            grad = (grads[u] * inverse + here.line("r")) * within
            grad = jnp.where(seen, grad, 0.0).astype(dtype)
            end, after = here.col("end"), held[u][0].astype(dtype)
            dv[u] = product(weight, dout[u], 1, 0) + end * product(k[u], after, 1, 0)
            inside, later = product(grad, q[u], 1, 0), _read(v[u], held[u][0], normalise)
            if normalise:
                later += held[u][1]
            phi, dphi = k[u].astype(f32), inside + end * later
            total = row_sums(phi * dphi) if normalise else dot(k[u], inside, end, later)
            at.k_dk[u] = jnp.transpose(total)
            a, n = u
            dk[u] = through(plan, at, lanes_of(plan, at.k[rows(plan, n)], a), phi, dphi, total)
        _put(plan, at.dk, gathered, dk)
        _put(plan, at.dv, added, dv)
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
