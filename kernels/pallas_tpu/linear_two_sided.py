"""Linear attention on TPU where every query reads every key: see `kernels.fused.linear`.

Nothing passes from chunk to chunk but the sums: a step of the grid is one chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.pallas_tpu.linear_body import (
    added,
    begin,
    chosen,
    column_sums,
    factors_of,
    features,
    finish,
    gathered,
    head_of,
    inverse_of,
    lanes_of,
    product,
    through,
    through_quotient,
    times,
)
from kernels.pallas_tpu.linear_plan import (
    call,
    f32,
    joined,
    lines,
    plan_of,
    rows_of,
    state_in,
    state_of,
    state_out,
    state_scratch,
    tokens,
    weight_in,
    wide,
)


def sums(k, v, *, end, fill=None, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = plan_of((k, v), projection, chunk).whole()

    def body(at):
        begin(at, plan)
        for a in range(plan.packed):
            k, v = features(plan, at, "k", a), lanes_of(plan, at.v[...], a)
            at.sums[a] += product(times(factors_of(at, a), k), v, 0, 0)
            at.norm[a] += column_sums(factors_of(at, a, 1) * k.astype(f32))
        finish(at, plan)

    ins = tokens(plan, k=k, v=v) | lines(plan, end=end, fill=fill)
    ins |= weight_in(plan, projection, k)
    made = call(body, plan, ins, state_out(plan), scratch=state_scratch(plan), interpret=interpret)
    return state_of(plan, made)


def read(q, sums, norm, *, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    values = jax.ShapeDtypeStruct((*q.shape[:2], sums.shape[1], sums.shape[3]), q.dtype)
    plan = plan_of((q, values), projection, chunk).whole()

    def body(at):
        outs = []
        for a in range(plan.packed):
            q = features(plan, at, "q", a)
            num = product(q, at.state_sums[a].astype(q.dtype), 1, 0)
            if normalise:
                den = jnp.sum(q.astype(f32) * at.state_norm[a], axis=1, keepdims=True)
                at.den[a, 0] = jnp.transpose(den)
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
    plan = plan_of((q, dout), projection, chunk).whole()

    def body(at):
        begin(at, plan, given=False)
        dq = []
        for a in range(plan.packed):
            q, dout = features(plan, at, "q", a), head_of(plan, at.dout[...], a)
            inverse, dnum = factors_of(at, a), product(dout, at.state_sums[a].astype(q.dtype), 1, 1)
            phi, dphi, r = through_quotient(q, dnum, at.state_norm[a], inverse)
            dq.append(through(plan, at, lanes_of(plan, at.q[...], a), phi, dphi, None))
            at.sums[a] += product(times(inverse, q), dout, 0, 0)
            at.norm[a] += column_sums(r * phi)
        at.dq[...] = gathered(plan, dq).astype(at.dq.dtype)
        finish(at, plan)

    ins = tokens(plan, q=q, dout=dout) | lines(plan, inv_den=inv_den)
    ins |= weight_in(plan, projection, q) | state_in(plan, (sums, norm))
    outs = {"dq": wide(plan, q.dtype, q.shape[3])} | state_out(plan)
    made = call(body, plan, ins, outs, scratch=state_scratch(plan), interpret=interpret)
    return made["dq"].reshape(*q.shape[:2], plan.heads, -1), state_of(plan, made)


def sums_backward(k, v, dsums, dnorm, *, end, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = plan_of((k, v), projection, chunk).whole()

    def body(at):
        dk, dv = [], []
        for a in range(plan.packed):
            k, v, end = features(plan, at, "k", a), lanes_of(plan, at.v[...], a), factors_of(at, a)
            held = at.state_sums[a].astype(v.dtype)
            dv.append(end * product(k, held, 1, 0))
            dphi, phi = end * (product(v, held, 1, 1) + at.state_norm[a]), k.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            at.k_dk[a, 0] = jnp.transpose(dot)
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
