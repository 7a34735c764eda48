"""The kernel of `stream` with FAVOR+'s features made inside, for Hopper.

    phi(x)_r = exp(<x, w_r> - offset),    offset = half |x|^2 + shift, of each token

The weight [R, 64], rounded to bfloat16 as all operands of products are, stays in shared memory;
so rounded it is as good a random projection. Either x and y are features (to give values), or z is
and the result passes through the features' derivative (to give gradients of what they are made of):

    values      p_ij = <phi(x_i), phi(y_j)>, S [R, 64]
    gradients   p_ij = <x_i, y_j>, S [64, R], and of d_i = sum_j p_ij phi(z_j) + read_i x_i S + ...,
                t = d_i phi(own_i):   out_i = t W - 2 half own_i sum t,   own: sum t

Each of the two computing warpgroups has half of the features. What rows get is a sum over features,
so the second hands its part to the first through shared memory (`given`, `taken`), chunk by chunk.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu import stream
from kernels.pallas_gpu.favor_plan import RANK, Plan
from kernels.pallas_gpu.plan import CHUNK, FILL, MEMORY, WIDTH, WORKERS, Role
from kernels.pallas_gpu.stream import (
    COMPUTING,
    FEEDING,
    LEAST,
    PARAMS,
    vector_of,
    weights,
)
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    add_matmul,
    by_column,
    by_row,
    constant,
    left,
    matmul,
)


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

    x, y, z, own: bfloat16 [B, T, G, 64]. weight: [R, 64]. With `own` the result is a gradient.

    More than `RANK` features are made by several runs of the kernel, whose float32 results are
    added up: with 256 in one, the state leaves too few registers for the rest.
    """
    blocks = [slice(at, at + RANK) for at in range(0, weight.shape[0], RANK)]
    how = {"half": half, "offsets": offsets, "heads": heads, "vectors": vectors, "fill": fill}
    how |= {"segments": segments, "interpret": interpret}
    if len(blocks) == 1:
        return _run(role, x, y, z, own, weight=weight, state=state, **how)
    role, made = dataclasses.replace(role, raw=True), []
    for block in blocks:
        S_at = (slice(None),) * (3 if role.own else 2) + (block,)
        part = None if state is None else (state[0][S_at], state[1][:, :, block])
        made.append(_run(role, x, y, z, own, weight=weight[block], state=part, **how))
    joined = {
        name: _together([getattr(m, name) for m in made], axis=2 if name in ("S", "n") else None)
        for name in ("out", "den", "own", "S", "n")
    }
    if role.divide:
        den = jnp.moveaxis(joined["den"], 1, 2)[..., None]
        dead = jnp.abs(den) <= LEAST
        joined["out"] = jnp.where(dead, 0.0, joined["out"] / jnp.where(dead, 1.0, den))
    if role.out:
        joined["out"] = joined["out"].astype(jnp.bfloat16)
    return SimpleNamespace(**joined)


def _together(parts: list, axis: int | None):
    """Parts side by side along an axis, or their sum; None where there are none."""
    if parts[0] is None:
        return None
    return sum(parts) if axis is None else jnp.concatenate(parts, axis=axis)


def _run(
    role: Role, x, y, z, own, *, weight, half, offsets, heads, vectors, fill, segments, state,
    interpret,
) -> SimpleNamespace:  # fmt: skip
    """`favor` in one kernel."""
    some = x if x is not None else y
    given = {name: a for name, a in (vectors or {}).items() if a is not None}
    given |= {f"offset_{name}": a for name, a in offsets.items()}
    plan = Plan(
        role, *some.shape[:2], heads, some.shape[-1], WIDTH, names=tuple(sorted(given)), stages=2,
        segments=segments is not None, state=state is not None, rank=weight.shape[0], half=half,
    )  # fmt: skip
    assert plan.bytes <= MEMORY, plan
    inputs = {"x": x, "y": y, "z": z, "own": own, "vectors": plans.pack(given, plan)}
    inputs["fill"] = plans.halves(fill, plan) if "fill" in plan.loads else None
    inputs["segments"] = segments
    inputs["numbers"] = jnp.arange(CHUNK, dtype=jnp.int32)
    inputs["S0"], inputs["n0"] = state if state is not None else (None, None)
    inputs["weight"] = weight.astype(jnp.bfloat16)
    inputs = {name: a for name, a in inputs.items() if a is not None}
    outputs = plan.outputs()
    made = plgpu.kernel(
        functools.partial(_body, plan, tuple(inputs), tuple(outputs), interpret),
        out_type=tuple(outputs.values()),
        grid=(heads, plan.batch),
        grid_names=("head", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=plan.scratch(interpret),
        compiler_params=PARAMS,
        **({"interpret": interpret} if interpret else {}),
    )(*inputs.values())
    made = dict(zip(outputs, made, strict=True))
    return SimpleNamespace(**{name: made.get(name) for name in ("out", "den", "own", "S", "n")})


def _body(plan: Plan, inputs, outputs, interpret, *refs, **scratch):
    """What each of the three warpgroups does."""
    r = SimpleNamespace(**dict(zip((*inputs, *(f"{o}_g" for o in outputs)), refs, strict=True)))
    r.__dict__.update(scratch)
    warpgroup = lax.axis_index("warpgroup")

    for index in range(WORKERS):

        @pl.when(warpgroup == index)
        def _(index=index):
            plgpu.set_max_registers(COMPUTING, action="increase")
            _compute(plan, r, index, interpret)

    @pl.when(warpgroup == WORKERS)
    def _():
        plgpu.set_max_registers(FEEDING, action="decrease")
        for index in range(WORKERS):
            part = r.weight.at[pl.ds(index * plan.part, plan.part)]
            plgpu.copy_gmem_to_smem(part, r.weight_s.at[index], r.ready)
        stream.feed(plan, r, interpret)


def _compute(plan: Plan, r, warpgroup: int, interpret):
    """A computing warpgroup: a head and half of the features, chunk after chunk."""
    role = plan.role
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    features = pl.ds(warpgroup * plan.part, plan.part)
    S_at = (b, h, slice(None), features) if plan.gradient else (b, h, features)
    read = _gradient if plan.gradient else _values

    def publish(S, n, warpgroup):
        """S in bfloat16, and n, where products and rows read them."""
        if role.out:
            r.S_s.at[warpgroup][...] = S.astype(jnp.bfloat16)
        if role.out and plan.sums:
            r.n_s.at[warpgroup][...] = n.sum(axis=1)
        plgpu.commit_smem()

    def step(count, carry):
        S, n = carry
        slot = lax.rem(count, jnp.int32(plan.stages))
        plgpu.barrier_wait(r.full.at[slot])
        me = r.me_s[warpgroup]  # see `stream.introduce`
        at = SimpleNamespace(slot=slot, tile=0, warpgroup=me)
        if role.within or role.update:
            for piece in plan.pieces:
                phi = _features(plan, r, at, plan.featured, piece)
                r.phi_s.at[me, :, piece][...] = phi.astype(jnp.bfloat16)
            plgpu.commit_smem()
        if role.out:
            part, sums = read(plan, r, at, interpret)
            rows = pl.ds(stream.chunk_of(plan, count) * CHUNK, CHUNK)
            _join(plan, r, warpgroup, count, part, sums, (b, h, rows))
        if role.update:
            S, n = _update(plan, r, at, S, n, interpret)
        plgpu.barrier_arrive(r.empty.at[slot])
        if role.update:
            publish(S, n, me)
        return S, n

    S, n = constant(0.0, plan.shape), constant(0.0, (plan.part, FILL)) if plan.sums else ()
    if plan.state:
        S = plgpu.load(r.S0.at[S_at], layout=LAYOUT, optimized=False)
    if plan.state and plan.sums:
        n = plgpu.load(r.n0.at[b, h, features], layout=ROWS, optimized=False)
        n = by_row(n * (1 / FILL), FILL)
    stream.introduce(r, warpgroup)
    publish(S, n, warpgroup)
    plgpu.barrier_wait(r.ready)
    S, n = lax.fori_loop(0, plan.chunks, step, (S, n))

    if role.out and warpgroup == 0:
        plgpu.wait_smem_to_gmem(0)
    if role.out and warpgroup == 1 and interpret:  # as in `stream.feed`
        plgpu.barrier_wait(r.taken)
    if role.update and not plan.gradient:
        r.S_g.at[S_at][...] = S
    if role.update and plan.sums:
        r.n_g.at[b, h, features][...] = n.sum(axis=1)


def _features(plan: Plan, r, at, name: str, piece):
    """phi of a chunk of x, y, z or own: some of this warpgroup's features, float32."""
    x = getattr(r, f"{name}_s").at[at.slot, at.tile]
    weight = r.weight_s.at[at.warpgroup, piece]
    logits = matmul((CHUNK, WIDTH), (x, weight.transpose((1, 0))))
    return jnp.exp(logits - by_row(vector_of(plan, r, at, f"offset_{name}", ROWS), WIDTH))


def _left(r, at, a, index: int, interpret):
    """A float32 matrix [64, 64] as a left operand, several at a time where interpreted."""
    spare_s = r.spare_s.at[at.warpgroup, index] if interpret else None
    return left(a.astype(jnp.bfloat16), spare_s)


def _values(plan: Plan, r, at, interpret):
    """This half's part of a chunk's sums [C, 64] and, where it divides, of their normaliser."""
    role, read, phis, den = plan.role, vector_of(plan, r, at, "read", ROWS), [], None
    for index, piece in enumerate(plan.pieces):
        phi = _features(plan, r, at, "x", piece)
        if role.divide:
            n = by_column(plgpu.load(r.n_s.at[at.warpgroup, piece], layout=COLUMNS), CHUNK)
            den = (phi * n).sum(axis=1) if den is None else den + (phi * n).sum(axis=1)
        phis.append(_left(r, at, phi, index, interpret))
    den = den if read is None or den is None else den * read
    y_s, S_s = r.phi_s.at[at.warpgroup] if role.within else None, r.S_s.at[at.warpgroup]
    both = list(zip(phis, plan.pieces, strict=True))
    if y_s is not None:
        products = matmul((CHUNK, CHUNK), *((a, y_s.at[:, p].transpose((1, 0))) for a, p in both))
    out = matmul((CHUNK, WIDTH), *((a, S_s.at[p]) for a, p in both))
    out = out if read is None else out * by_row(read, WIDTH)
    if y_s is None:
        return out, den
    p = weights(plan, r, at, products)
    den = den + p.sum(axis=1) if role.divide else None
    pair = (_left(r, at, p, len(plan.pieces), interpret), r.z_s.at[at.slot, at.tile])
    return add_matmul(out, pair, interpret=interpret), den


def _gradient(plan: Plan, r, at, interpret):
    """This half's part of a chunk's gradient [C, 64], and the sum of its t."""
    role, vector = plan.role, functools.partial(vector_of, plan, r, at)
    x, inner = r.x_s.at[at.slot, at.tile], []
    read, lift = vector("read", ROWS), vector("lift", ROWS)
    if role.within:
        y = r.y_s.at[at.slot, at.tile]
        p = weights(plan, r, at, matmul((CHUNK, CHUNK), (x, y.transpose((1, 0)))))
        inner = [_left(r, at, p, len(plan.pieces), interpret)]
    out, total = constant(0.0, (CHUNK, WIDTH)), constant(0.0, (CHUNK,), ROWS)
    for index, piece in enumerate(plan.pieces):
        d = matmul((CHUNK, WIDTH), (x, r.S_s.at[at.warpgroup, :, piece]))
        d = d if read is None else d * by_row(read, WIDTH)
        if role.lift:
            n = by_column(plgpu.load(r.n_s.at[at.warpgroup, piece], layout=COLUMNS), CHUNK)
            d += n if lift is None else n * by_row(lift, WIDTH)
        pairs = [(p, r.phi_s.at[at.warpgroup, :, piece]) for p in inner]
        d = add_matmul(d, *pairs, interpret=interpret) if inner else d
        t = d * _features(plan, r, at, "own", piece)
        total += t.sum(axis=1)
        pair = (_left(r, at, t, index, interpret), r.weight_s.at[at.warpgroup, piece])
        out = add_matmul(out, pair, interpret=interpret)
    own = plgpu.load(r.own_s.at[at.slot, at.tile], layout=LAYOUT).astype(jnp.float32)
    return out - own * by_row(total * (2 * plan.half), WIDTH), total


def _update(plan: Plan, r, at, S, n, interpret):
    """S and n after a chunk."""
    other = r.y_s if plan.gradient else r.z_s
    other, phi = other.at[at.slot, at.tile], r.phi_s.at[at.warpgroup]
    enter = vector_of(plan, r, at, "enter", ROWS)
    if "keep" in plan.names:
        keep = r.vectors_s[at.slot, at.tile, plan.names.index("keep"), 0]
        S, n = S * keep, n * keep if plan.sums else n
    if plan.sums:
        pairs = phi.transpose((1, 0)), r.fill_s.at[at.slot, at.tile].transpose((1, 0))
        n = add_matmul(n, pairs, interpret=interpret)
    if enter is not None:
        entering = plgpu.load(other, layout=LAYOUT).astype(jnp.float32) * by_row(enter, WIDTH)
        other = r.enter_s.at[at.warpgroup]
        other[...] = entering.astype(jnp.bfloat16)
        plgpu.commit_smem()
    a, b = (other, phi) if plan.gradient else (phi, other)
    return add_matmul(S, (a.transpose((1, 0)), b), interpret=interpret), n


def _join(plan: Plan, r, warpgroup: int, count, part, sums, place):
    """The second warpgroup hands over its part of a chunk; the first adds, divides, stores."""
    if warpgroup == 1:

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(r.taken)

        r.part_s.at[:, pl.ds(0, WIDTH)][...] = part
        if sums is not None:
            r.sums_s[...] = sums
        plgpu.barrier_arrive(r.given)
        return
    plgpu.barrier_wait(r.given)
    out = part + plgpu.load(r.part_s.at[:, pl.ds(0, WIDTH)], layout=LAYOUT, optimized=False)
    if sums is not None:
        sums += plgpu.load(r.sums_s, layout=ROWS)
    plgpu.barrier_arrive(r.taken)
    if plan.role.divide and not plan.role.raw:
        dead = jnp.abs(sums) <= LEAST  # NaN is alive
        out *= by_row(jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, sums)), WIDTH)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was last made has left
    r.out_s[...] = out.astype(plan.out_dtype)
    if sums is not None:
        r.total_s[...] = sums
    plgpu.commit_smem()
    b, h, rows = place
    plgpu.copy_smem_to_gmem(r.out_s, r.out_g.at[b, rows, h])
    if sums is not None:
        to = r.den_g if plan.role.divide else r.own_g
        plgpu.copy_smem_to_gmem(r.total_s, to.at[b, h, rows])
