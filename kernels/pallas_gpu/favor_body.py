"""What the kernel of `favor` does in the pipeline of `kernels.pallas_gpu.pipeline`.

    phi(x)_r = exp(<x, w_r> - offset),    offset = half |x|^2 + shift, of each token

The weight stays in shared memory, in two bfloat16 parts whose products with x are added up. (With
one, the output of 64 channels and 128 features, two-sided, is off by 4.5e-3 of itself, with two by
3.2e-3, in the interpreter.) The last product with it, t W below, takes the first part only, as t is
rounded too. Either x and y are features (to give values), or z is and the result passes through the
features' derivative (to give gradients of what they are made of):

    values      p_ij = <phi(x_i), phi(y_j)>, S [R, 64]
    gradients   p_ij = <x_i, y_j>, S [64, R], and of d_i = sum_j p_ij phi(z_j) + read_i x_i S + ...,
                t = d_i phi(own_i):   out_i = t W - 2 half own_i sum t,   own: sum t

Each of the two computing warpgroups has half of the features. What rows get is a sum over features,
so the second hands its part to the first through shared memory (`given`, `taken`), 64 columns at a
time.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fused.passes import LEAST
from kernels.pallas_gpu.favor_plan import RANK, Plan
from kernels.pallas_gpu.feed import chunk_of
from kernels.pallas_gpu.pipeline import Work, vector_of, weights
from kernels.pallas_gpu.plan import CHUNK, WIDTH, WORKERS
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    add_matmul,
    by_column,
    by_row,
    left,
    matmul,
)


def _places(plan: Plan, index: int):
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    features = pl.ds(index * WIDTH, WIDTH)
    n_at = b, h, features
    return (b, h, slice(None), features) if plan.gradient else n_at, n_at


def _fetch(plan: Plan, r):
    for index in range(WORKERS):
        part = r.weight.at[:, pl.ds(index * WIDTH, WIDTH)]
        plgpu.copy_gmem_to_smem(part, r.weight_s.at[index], r.ready)


def _begin(plan: Plan, r, at):
    """Features of the chunk that are read more than once, in shared memory."""
    if plan.role.out and at.index == 0:
        pl.when(at.count > 0)(functools.partial(_release, r))
    if plan.role.within or plan.role.update:
        phi = _features(plan, r, at, "z" if plan.gradient else "y")
        r.phi_s.at[at.warpgroup][...] = phi.astype(jnp.bfloat16)
        plgpu.commit_smem()


def _operands(plan: Plan, r, at):
    other, phi = r.y_s if plan.gradient else r.z_s, r.phi_s.at[at.warpgroup]
    other = other.at[at.slot, at.tile]
    return (other, phi, phi) if plan.gradient else (phi, other, phi)


def _read(plan: Plan, r, at, interpret):
    (_gradient if plan.gradient else _values)(plan, r, at, interpret)


WORK = Work(_places, _read, _operands, _begin, _fetch)


def _features(plan: Plan, r, at, name: str):
    """phi of a chunk of x, y, z or own: this warpgroup's features, float32."""
    x = getattr(r, f"{name}_s").at[at.slot, at.tile]
    parts = (r.weight_s.at[at.warpgroup, part].transpose((1, 0)) for part in range(2))
    logits = matmul((CHUNK, WIDTH), *((x, w) for w in parts))
    phi = jnp.exp(logits - by_row(vector_of(plan, r, at, f"offset_{name}", ROWS), WIDTH))
    if plan.features == RANK:
        return phi
    numbers = by_column(plgpu.load(r.numbers_s.at[at.warpgroup], layout=COLUMNS), CHUNK)
    return jnp.where(numbers < plan.features - at.index * WIDTH, phi, 0.0)


def _left(r, at, a, index: int, interpret):
    """A float32 matrix [64, 64] as a left operand, two at a time where interpreted."""
    spare_s = r.spare_s.at[at.warpgroup, index] if interpret else None
    return left(a.astype(jnp.bfloat16), spare_s)


def _values(plan: Plan, r, at, interpret):
    """A chunk's sums [C, 64] and, where it divides, their normaliser."""
    role, read, den = plan.role, vector_of(plan, r, at, "read", ROWS), None
    phi = _features(plan, r, at, "x")
    if role.divide:
        n = by_column(plgpu.load(r.n_s.at[at.warpgroup], layout=COLUMNS), CHUNK)
        den = (phi * n).sum(axis=1)
        den = den if read is None else den * read
    phi = _left(r, at, phi, 0, interpret)
    if role.within:
        y_s = r.phi_s.at[at.warpgroup]
        products = matmul((CHUNK, CHUNK), (phi, y_s.transpose((1, 0))))
    out = matmul((CHUNK, WIDTH), (phi, r.S_s.at[at.warpgroup]))
    out = out if read is None else out * by_row(read, WIDTH)
    if role.within:
        p = weights(plan, r, at, products)
        den = den + p.sum(axis=1) if role.divide else None
        pair = (_left(r, at, p, 1, interpret), r.z_s.at[at.slot, at.tile])
        out = add_matmul(out, pair, interpret=interpret)
    _join(plan, r, at, 0, out, den)


def _gradient(plan: Plan, r, at, interpret):
    """A chunk's gradient [C, D], and the sum of its t."""
    role, vector = plan.role, functools.partial(vector_of, plan, r, at)
    x, read, lift = r.x_s.at[at.slot, at.tile], vector("read", ROWS), vector("lift", ROWS)
    if role.within:
        y = r.y_s.at[at.slot, at.tile]
        p = weights(plan, r, at, matmul((CHUNK, CHUNK), (x, y.transpose((1, 0)))))
        p = _left(r, at, p, 1, interpret)
    d = matmul((CHUNK, WIDTH), (x, r.S_s.at[at.warpgroup]))
    d = d if read is None else d * by_row(read, WIDTH)
    if role.lift:
        n = by_column(plgpu.load(r.n_s.at[at.warpgroup], layout=COLUMNS), CHUNK)
        d += n if lift is None else n * by_row(lift, WIDTH)
    if role.within:
        d = add_matmul(d, (p, r.phi_s.at[at.warpgroup]), interpret=interpret)
    t = d * _features(plan, r, at, "own")
    total = t.sum(axis=1)
    t = _left(r, at, t, 0, interpret)
    for half in range(plan.width // WIDTH):
        columns = pl.ds(half * WIDTH, WIDTH)
        own = plgpu.load(r.own_s.at[at.slot, at.tile, :, columns], layout=LAYOUT)
        out = own.astype(jnp.float32) * by_row(total * (-2 * plan.half), WIDTH)
        pair = t, r.weight_s.at[at.warpgroup, 0, :, columns]
        out = add_matmul(out, pair, interpret=interpret)
        if half and at.index == 0:
            _release(r)
        _join(plan, r, at, half, out, None if half else total)


def _release(r):
    """Tells the second warpgroup that what it handed over last, and what became of it, has left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(r.taken)


def _join(plan: Plan, r, at, half: int, part, sums):
    """The second warpgroup hands over its part of 64 columns; the first adds, divides, stores."""
    if at.index == 1:
        if half:
            plgpu.barrier_wait(r.taken)
        else:
            pl.when(at.count > 0)(lambda: plgpu.barrier_wait(r.taken))
        r.part_s[...] = part
        if sums is not None:
            r.sums_s[...] = sums
        plgpu.commit_smem()  # all four warps have read S_s, which `enter` is about to overwrite
        plgpu.barrier_arrive(r.given)
        return
    plgpu.barrier_wait(r.given)
    out = part + plgpu.load(r.part_s, layout=LAYOUT)
    if sums is not None:
        sums += plgpu.load(r.sums_s, layout=ROWS)
    if plan.role.divide and not plan.role.raw:
        dead = jnp.abs(sums) <= LEAST  # NaN is alive
        out *= by_row(jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, sums)), WIDTH)
    out_s = r.part_s if plan.role.raw else r.out_s
    out_s[...] = out.astype(plan.out_dtype)
    if sums is not None:
        r.total_s[...] = sums
    plgpu.commit_smem()
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    rows = pl.ds(chunk_of(plan, at.count) * CHUNK, CHUNK)
    plgpu.copy_smem_to_gmem(out_s, r.out_g.at[b, rows, h, pl.ds(half * WIDTH, WIDTH)])
    if sums is not None:
        to = r.den_g if plan.role.divide else r.own_g
        plgpu.copy_smem_to_gmem(r.total_s, to.at[b, h, rows])
