"""`stream` with FAVOR+'s features made inside; `kernels.pallas_gpu.favor_body` has the formulas.

The kernel makes 128 features of 64 or 128 channels, for values of 64. All else is exact around it:

- More features are made by several runs, whose float32 results are added up; of those that the
  last of them makes too many are 0.
- 128 channels of values are two heads of 64 that share all but them. Outputs lie side by side;
  a gradient of what features are made of, being linear in values, is the sum of both.
- Other numbers of channels are filled up with zeros, which change neither <x, w> nor |x|^2.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.fused.passes import LEAST
from kernels.pallas_gpu.favor_body import WORK
from kernels.pallas_gpu.favor_plan import RANK, Plan
from kernels.pallas_gpu.fit import filled, whole
from kernels.pallas_gpu.pipeline import run
from kernels.pallas_gpu.plan import MEMORY, WIDTH, Role, in_parts

NAMES = "out", "den", "own", "S", "n"


def favor(
    role: Role,
    x: jax.Array | None,
    y: jax.Array | None,
    z: jax.Array | None,
    own: jax.Array | None = None,
    *,
    weight: jax.Array,
    half: float,
    offsets: dict[str, jax.Array],
    heads: int,
    vectors: dict[str, jax.Array | None] | None = None,
    fill: jax.Array | None = None,
    segments: jax.Array | None = None,
    state: tuple[jax.Array, jax.Array] | None = None,
    interpret: Any,
) -> SimpleNamespace:
    """As `stream.stream`, which see, with features of what `offsets` names: [B, H, T] each.

    weight: [R, D]. Without `own` x and y have D channels, z and the result are values; with it z,
    own and the result have D, a gradient.
    """
    depth, of_values = weight.shape[1], x if role.own else z
    values = (state[0] if of_values is None else of_values).shape[-1]
    fit = whole(depth)
    x, y, z, own, weight = (filled(a, -1, fit) for a in (x, y, z, own, weight))
    if state is not None:
        state = filled(state[0], 2 if role.own else 3, fit), state[1]
    named = {name: a for name, a in (vectors or {}).items() if a is not None}
    named |= {f"offset_{name}": a for name, a in offsets.items()}
    call = _Call(role, x, y, z, own, heads, named, fill, segments, state)
    parts = -(-values // WIDTH)
    if parts > 1:
        call = _apart(call, parts)
    made = _in_blocks(call, weight, half, interpret, add=role.own and parts > 1)
    if parts > 1:
        made = _together(role, made, parts)
    if role.out:
        made.out = made.out[..., : depth if role.own else values].astype(jnp.bfloat16)
    if made.S is not None:
        made.S = made.S[..., :values]
    return made


class _Call(NamedTuple):
    """Arguments of `favor`, channels filled up; offsets are among the vectors."""

    role: Role
    x: jax.Array | None
    y: jax.Array | None
    z: jax.Array | None
    own: jax.Array | None
    heads: int
    vectors: dict[str, jax.Array]
    fill: jax.Array | None
    segments: jax.Array | None
    state: tuple[jax.Array, jax.Array] | None


def _apart(call: _Call, parts: int) -> _Call:
    """Each head as `parts` of 64 channels of values; what does not depend on these is the first's.

    That is `shift` and `lift`, which are added to what values give.
    """
    values = ("x", "y") if call.role.own else ("z",)
    vectors, state, fill = call.vectors, call.state, call.fill
    again = functools.partial(jnp.repeat, repeats=parts, axis=1)

    def of_head(a):  # [B, T, G, E] -> [B, T, H parts, 64]
        a = jnp.repeat(a, call.heads // a.shape[2], axis=2)
        return a.reshape(*a.shape[:2], -1, WIDTH)

    def first(a):
        none = [jnp.zeros_like(a)] * (parts - 1)
        return jnp.stack([a, *none], axis=2).reshape(a.shape[0], -1, *a.shape[2:])

    if call.role.lift and "lift" not in vectors:
        vectors = vectors | {"lift": jnp.ones_like(vectors["offset_own"])}
    vectors = {n: (first if n in ("shift", "lift") else again)(a) for n, a in vectors.items()}
    if state is not None:
        S, n = state
        if call.role.own:  # [B, H, E, R]
            S = S.reshape(S.shape[0], -1, WIDTH, S.shape[-1])
        else:  # [B, H, R, E]
            S = jnp.moveaxis(S.reshape(*S.shape[:3], parts, WIDTH), 3, 2)
            S = S.reshape(S.shape[0], -1, *S.shape[-2:])
        state = S, again(n)
    arrays = {name: getattr(call, name) for name in values}
    arrays = {name: None if a is None else of_head(a) for name, a in arrays.items()}
    return call._replace(
        heads=call.heads * parts, vectors=vectors, fill=None if fill is None else again(fill),
        state=state, **arrays,
    )  # fmt: skip


def _together(role: Role, made: SimpleNamespace, parts: int) -> SimpleNamespace:
    """What the heads of `_apart` give for those that they are parts of."""
    split = lambda a, axis: a.reshape(*a.shape[:axis], -1, parts, *a.shape[axis + 1 :])  # noqa: E731
    if made.out is not None and role.own:
        made.out, made.own = split(made.out, 2).sum(3), split(made.own, 1).sum(2)
    elif made.out is not None:
        made.out = made.out.reshape(*made.out.shape[:2], -1, parts * WIDTH)
    if made.S is not None:
        S = jnp.moveaxis(split(made.S, 1), 2, 3)  # [B, H, R, parts, 64]
        made.S = S.reshape(*S.shape[:3], -1)
    for name in ("den", "n"):
        a = getattr(made, name)
        setattr(made, name, None if a is None else split(a, 1)[:, :, 0])
    return made


def _in_blocks(call: _Call, weight, half: float, interpret, *, add: bool) -> SimpleNamespace:
    """The kernel for as many features as there are; in float32 if some, or if `add`, add up."""
    rank = weight.shape[0]
    blocks = [slice(at, at + RANK) for at in range(0, rank, RANK)]
    role = dataclasses.replace(call.role, raw=call.role.out and (add or len(blocks) > 1))
    axis, made = 3 if role.own else 2, []
    for block in blocks:
        state = call.state
        if state is not None:
            S = state[0][(slice(None),) * axis + (block,)]
            state = filled(S, axis, RANK), filled(state[1][:, :, block], 2, RANK)
        part = call._replace(role=role, state=state)
        made.append(_run(part, weight[block], half, interpret))
    joined = {name: _joined([m.get(name) for m in made], name, rank) for name in NAMES}
    if role.divide and role.raw:
        den = jnp.moveaxis(joined["den"], 1, 2)[..., None]
        dead = jnp.abs(den) <= LEAST
        joined["out"] = jnp.where(dead, 0.0, joined["out"] / jnp.where(dead, 1.0, den))
    return SimpleNamespace(**joined)


def _joined(parts: list, name: str, rank: int):
    """S and n of all features side by side, else a sum; None where there are none."""
    if parts[0] is None:
        return None
    if name in ("S", "n"):
        return jnp.concatenate(parts, axis=2)[:, :, :rank]
    return sum(parts[1:], parts[0])


def _run(call: _Call, weight, half: float, interpret) -> dict[str, jax.Array]:
    """One kernel, of the features of weight [R, D], up to 128."""
    role, some = call.role, call.x if call.x is not None else call.y
    width = call.own.shape[-1] if role.own else WIDTH
    plan = Plan(
        role, *some.shape[:2], call.heads, some.shape[-1], width, tuple(sorted(call.vectors)),
        stages=2, segments=call.segments is not None, state=call.state is not None, half=half,
        features=weight.shape[0],
    )  # fmt: skip
    assert plan.bytes <= MEMORY, plan
    arrays = {"x": call.x, "y": call.y, "z": call.z, "own": call.own}
    arrays |= {"segments": call.segments, "weight": in_parts(filled(weight, 0, RANK))}
    return run(WORK, plan, arrays, call.vectors, call.fill, call.state, interpret)
