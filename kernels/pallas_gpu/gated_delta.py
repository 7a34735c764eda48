"""The gated delta rule on Hopper: the kernels of `kernels.fused.gated_delta`.

The chunks' triangular systems are inverted all at once (`inverse`); two passes go from chunk to
chunk, for what every token really writes, `change`, and for the gradient `dread` of what is held
under its key (`delta_body`). All else is causal linear attention whose values are change, and whose
keys are asked twice, by q and by later keys, with dout and dread (`stream`):

    dq_i  = sum_{j <= i} <dout_i, change_j> k_j
    dk_i  = sum_{j < i} <dread_i, change_j> k_j
          + sum_{j >= i} <change_i, dout_j> q_j + sum_{j > i} <change_i, dread_j> k_j

each fading on its way, and over all chunks.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.fused.ways import Ways
from kernels.pallas_gpu.delta_body import BACKWARD, FORWARD, Plan
from kernels.pallas_gpu.fit import WIDTHS, Fit, fit, refuse_dtype
from kernels.pallas_gpu.inverse import inverses
from kernels.pallas_gpu.pipeline import Work, run
from kernels.pallas_gpu.plan import CHUNK, Role, plan_of
from kernels.pallas_gpu.stream import stream

LEAST_BETA = 1e-10
"""What the gradient takes a beta of 0 for: what was to be written is change / beta."""

__all__ = ["CHUNK", "backward", "forward", "refuse"]


def refuse(q, k, v) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if reason := refuse_dtype(v=v):
        return reason
    if k.shape[3] > WIDTHS[-1]:
        return (
            f"keys have {k.shape[3]} channels a head, the Hopper kernels take {WIDTHS[-1]}: use "
            "backend='xla'"
        )
    return None


def forward(q, k, v, ways: Ways, beta, *, state, interpret=None):
    """See `kernels.fused.gated_delta`."""
    to = fit(k.shape[3], v.shape[3])
    q, k, v, state = to.keys(q), to.keys(k), to.values(v), to.state(state)
    of = _Of(to, ways, beta, _inverse(k, ways, beta, interpret), interpret)
    made = _sweep(FORWARD, Role(), {"x": q, "y": k, "z": v}, of, state)
    return to.of_values(made["out"]), to.of_state(made["S"])


def backward(q, k, v, ways: Ways, beta, *, dout, state, dstate, interpret=None):
    """See `kernels.fused.gated_delta`."""
    to = fit(k.shape[3], v.shape[3])
    beta = jnp.where(beta == 0, LEAST_BETA, beta)
    q, k, v, dout = to.keys(q), to.keys(k), to.values(v), to.values(dout)
    of = _Of(to, ways, beta, _inverse(k, ways, beta, interpret), interpret)
    state, dstate = to.state(state), to.state(dstate)
    change = _sweep(FORWARD, Role(within=False), {"y": k, "z": v}, of, state)["out"]
    made = _sweep(BACKWARD, Role(reverse=True), {"x": k, "y": q, "z": dout}, of, dstate)
    dread, before = made["out"], made["S"]

    more = {"heads": v.shape[2], "segments": ways.segments, "interpret": interpret}
    past = {"vectors": of.past(), "state": _turned(state), **more}
    future = {"vectors": of.future(), **more}
    own = Role(own=True, precise=True)
    query = stream(own, dout, change, k, q, **past)
    read = stream(replace(own, strict=True), dread, change, k, k, **past)
    own = replace(own, reverse=True)
    written = stream(own, change, dout, q, k, state=_turned(dstate), **future)
    held = stream(replace(own, strict=True), change, dread, k, k, **future)

    dk = sum(made.out.astype(jnp.float32) for made in (read, written, held))
    dread, change = to.of_values(dread), to.of_values(change)
    per_beta = (
        x.astype(jnp.float32) / jnp.swapaxes(beta, 1, 2)[..., None] for x in (dread, change)
    )
    dbeta = -jnp.einsum("bthd,bthd->bht", *per_beta)
    passed = to.of_numbers(query.own + read.own - written.own - held.own)
    dq, dk = (to.of_keys(x).astype(k.dtype) for x in (query.out, dk))
    last = jnp.swapaxes(query.S, 2, 3)
    return dq, dk, -dread, dbeta, passed, to.of_state(before), to.of_state(last)


class _Of(NamedTuple):
    """What all passes of a call have to do with."""

    fit: Fit
    ways: Ways
    beta: jax.Array
    inverse: jax.Array
    interpret: Any

    def past(self) -> dict[str, jax.Array]:
        """Vectors of a pass whose rows see what comes before them."""
        ways = self.ways
        made = {"row": -ways.row, "column": ways.col, "read": ways.start, "enter": ways.end}
        return {name: self.fit.numbers(x) for name, x in (made | {"keep": ways.keep}).items()}

    def future(self) -> dict[str, jax.Array]:
        """Vectors of a reverse pass."""
        past = self.past()
        turned = {"row": "column", "column": "row", "read": "enter", "enter": "read"}
        return past | {name: past[other] for name, other in turned.items()}


def _inverse(k, ways: Ways, beta, interpret):
    rows = {"beta": beta, "row": -ways.row, "column": ways.col, "segments": ways.segments}
    return inverses(k, **rows, interpret=interpret)


def _sweep(work: Work, role: Role, arrays, of: _Of, state):
    """One of `delta_body`: out and S."""
    vectors = (of.future if role.reverse else of.past)() | {"beta": of.fit.numbers(of.beta)}
    segments, z = of.ways.segments, arrays["z"]
    plan = plan_of(
        role, z.shape[3], arrays.get("x"), arrays["y"], z.shape[2], tuple(sorted(vectors)),
        kind=Plan, segments=segments is not None, state=state is not None,
    )  # fmt: skip
    arrays |= {"inverse": of.inverse, "segments": segments}
    state = None if state is None else (state, None)
    return run(work, plan, arrays, vectors, None, state, of.interpret)


def _turned(state):
    """For keys that are asked by values."""
    return None if state is None else (jnp.swapaxes(state, -1, -2), None)
