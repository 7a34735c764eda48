"""The kernel of linear attention on Hopper, of features that are given.

In the pipeline of `kernels.pallas_gpu.pipeline` it holds, for a head and 64 of the columns of z,

    p_ij  = (<x_i, y_j> gain + shift) exp(row_i + column_j)      over the j that i sees in its chunk
    out_i = sum_j p_ij z_j + read_i x_i S + lift_i n
    S     <- keep S + sum_j enter_j y_j z_j^T                    [D, 64]

and a vector n: where out_i is divided by sum_j p_ij + read_i <x_i, n>, the sum of fill_j y_j, else
of fill_j z_j. Products take bfloat16 and give float32.

With 128 columns the two computing warpgroups work on the halves of one head and share x and y, with
64 on two heads.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fused.passes import LEAST
from kernels.pallas_gpu.feed import chunk_of, mine, place_of
from kernels.pallas_gpu.fit import filled, whole
from kernels.pallas_gpu.pipeline import Work, run, vector_of, weights, when
from kernels.pallas_gpu.plan import CHUNK, WIDTH, Plan, Role, plan_of
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
    rounded,
)


def stream(
    role: Role,
    x: jax.Array | None,
    y: jax.Array | None,
    z: jax.Array | None,
    own: jax.Array | None = None,
    *,
    heads: int,
    vectors: dict[str, jax.Array | None] | None = None,
    fill: jax.Array | None = None,
    segments: jax.Array | None = None,
    state: tuple[jax.Array, jax.Array | None] | None = None,
    interpret: Any,
) -> SimpleNamespace:
    """Runs the kernel; see the module's formula.

    x, y: bfloat16 [B, T, G, D]; z, own: [B, T, G, E], each with its own number of heads, which
    divides `heads`, D and E up to 128; None what the role does not need. vectors: float32 [B, H, T]
    by name (`keep`: [B, H, N]); one that is missing is 1 (`shift`: 0; `row` and `column`: 0, both).
    fill: [B, H, T]; None is 1. segments: int32 [B, T]. state: (S [B, H, D, E], n) before the first
    chunk, else 0; n is None where there is none.

    Returns: out [B, T, H, E]; den and own [B, H, T]; S and n; None what the role does not make.
    """
    vectors = {name: a for name, a in (vectors or {}).items() if a is not None}
    depth, width = ((state[0].shape[i] if a is None else a.shape[-1]) for i, a in ((2, y), (3, z)))
    fit = whole(max(depth, width))
    arrays = {"x": x, "y": y, "z": z, "own": own}
    arrays = {name: filled(a, 3, fit) for name, a in arrays.items()} | {"segments": segments}
    if state is not None:
        state = filled(filled(state[0], 2, fit), 3, fit), filled(state[1], 2, fit)
    plan = plan_of(
        role, fit, arrays["x"], arrays["y"], heads, tuple(sorted(vectors)),
        segments=segments is not None, state=state is not None,
    )  # fmt: skip
    made = run(Work(places, _read, _operands), plan, arrays, vectors, fill, state, interpret)
    made = {name: made.get(name) for name in ("out", "den", "own", "S", "n")}
    cut = {"out": (..., slice(width)), "S": (..., slice(depth), slice(width))}
    cut["n"] = ..., slice(depth if plan.summed == "y" else width)
    made |= {name: made[name][at] for name, at in cut.items() if made[name] is not None}
    made["own"] = None if made["own"] is None else jnp.sum(made["own"], axis=0)
    return SimpleNamespace(**made)


def places(plan: Plan, index: int):
    """Where a computing warpgroup's parts of S and n are."""
    b, h, column = place_of(plan, index)
    columns = pl.ds(column, WIDTH)
    return (b, h, slice(None), columns), (b, h) if plan.summed == "y" else (b, h, columns)


def _operands(plan: Plan, r, at):
    y, z = r.y_s.at[at.slot, at.tile], r.z_s.at[at.slot, at.warpgroup]
    return y, z, y if plan.summed == "y" else z


def _read(plan: Plan, r, at, interpret):
    z = r.z_s.at[at.slot, at.warpgroup] if plan.role.within else None
    send(plan, r, at, made_of(plan, r, at, z, interpret))


def send(plan: Plan, r, at, made: dict[str, jax.Array]):
    """Sends off what was made of a chunk."""
    made["out"] = made["out"].astype(r.out_s.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was last made has left
    for name, a in made.items():
        getattr(r, f"{name}_s").at[at.warpgroup][...] = a
    plgpu.commit_smem()
    _store(plan, r, at.index, pl.ds(chunk_of(plan, at.count) * CHUNK, CHUNK))


def made_of(plan: Plan, r, at, z, interpret) -> dict[str, jax.Array]:
    """What the rows of a chunk read, of the columns z in shared memory, by the name of the output.

    All in float32.
    """
    role, x = plan.role, r.x_s.at[at.slot, at.tile]
    vector = functools.partial(vector_of, plan, r, at)
    read, made, inner = vector("read", ROWS), {}, []
    den = _den(plan, r, at) if role.divide else None
    if role.within:
        y = r.y_s.at[at.slot, at.tile]
        p = weights(plan, r, at, matmul((CHUNK, CHUNK), (x, y.transpose((1, 0)))))
        den = den + p.sum(axis=1) if role.divide else None
        spare_s = r.spare_s.at[at.warpgroup] if interpret else None
        inner = [(left(p.astype(jnp.bfloat16), spare_s), z)]
    past = [(x, r.S_s.at[at.warpgroup])]
    if role.precise:
        past.append((x, r.low_s.at[at.warpgroup]))
    rest = None
    if read is None:
        out = matmul((CHUNK, WIDTH), *past, *inner)
    else:
        out = matmul((CHUNK, WIDTH), *past)
        if role.precise:
            entered = _own(r, at) * by_row(read, WIDTH)
            rest = (out * (rounded(entered, interpret) - entered)).sum(axis=1)
        out *= by_row(read, WIDTH)
        out = add_matmul(out, *inner, interpret=interpret) if inner else out
    if role.lift:
        n = by_column(plgpu.load(r.n_s.at[at.warpgroup], layout=COLUMNS), CHUNK)
        lift = vector("lift", ROWS)
        out += n if lift is None else n * by_row(lift, WIDTH)
    if role.divide:
        dead = jnp.abs(den) <= LEAST  # NaN is alive
        out *= by_row(jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, den)), WIDTH)
        made["den"] = den
    if role.own:
        sums = (out * _own(r, at)).sum(axis=1)
        made["sum"] = sums if rest is None else sums + rest
    return made | {"out": out}


def _own(r, at):
    return plgpu.load(r.own_s.at[at.slot, at.warpgroup], layout=LAYOUT).astype(jnp.float32)


def _den(plan: Plan, r, at):
    """What rows read of n, 64 columns at a time: registers are few."""

    def add(index, den):
        columns = pl.ds(index * WIDTH, WIDTH)
        x = plgpu.load(r.x_s.at[at.slot, at.tile, :, columns], layout=LAYOUT).astype(jnp.float32)
        n = plgpu.load(r.n_s.at[at.warpgroup, columns], layout=COLUMNS)
        return den + (x * by_column(n, CHUNK)).sum(axis=1)

    read = vector_of(plan, r, at, "read", ROWS)
    den = lax.fori_loop(0, plan.depth // WIDTH, add, constant(0.0, (CHUNK,), ROWS))
    return den if read is None else den * read


def _store(plan: Plan, r, index: int, rows):
    """Sends what `_read` has put into shared memory."""
    b, h, column = place_of(plan, index)

    @when(mine(plan, index))
    def _():
        to = r.out_g.at[b, rows, h, pl.ds(column, WIDTH)]
        plgpu.copy_smem_to_gmem(r.out_s.at[index], to)
        if plan.role.own:
            to = r.own_g.at[index if plan.tiles == 1 else 0, b, h, rows]
            plgpu.copy_smem_to_gmem(r.sum_s.at[index], to)

    if plan.role.divide:

        @when(mine(plan, index, shared=True))
        def _():
            plgpu.copy_smem_to_gmem(r.den_s.at[index], r.den_g.at[b, h, rows])
