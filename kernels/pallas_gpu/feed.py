"""How a chunk's operands come to linear attention's kernel on Hopper: by TMA, through a ring."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.plan import (
    CHUNK,
    WIDTH,
    WORKERS,
    Plan,
)


def place_of(plan: Plan, index):
    """Example, head and first column that a computing warpgroup of this CTA is for.

    Where an odd head is left over, the last one is computed twice; see `mine`.
    """
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    if plan.tiles == 1:
        return b, h, index * WIDTH
    h = WORKERS * h + index
    return b, jnp.minimum(h, plan.heads - 1) if plan.heads % WORKERS else h, 0


def mine(plan: Plan, index: int, *, shared: bool = False):
    """Whether a computing warpgroup is the one that writes its results: a bool, or traced.

    shared: of what both have that share a head.
    """
    if plan.tiles == 1:
        return index == 0 or not shared
    return plan.heads % WORKERS == 0 or WORKERS * lax.axis_index("head") + index < plan.heads


def chunk_of(plan: Plan, step):
    """The chunk that a step is about."""
    return plan.chunks - 1 - step if plan.role.reverse else step


def feed(plan: Plan, r, interpret):
    """The memory warpgroup: fills the ring, stage after stage.

    Where its loop begins is read from memory. Were it known, a loop of few chunks, as of a sequence
    in pieces, would be unrolled, and its addresses need more registers than this warpgroup has.
    """
    stages = plan.stages

    def group(groups: int, h):
        per = plan.heads // groups
        return h if per == 1 else lax.div(h, jnp.int32(per))

    def source(name, index, rows):
        b, h, column = place_of(plan, index)
        ref = getattr(r, name)
        if name in ("x", "y"):
            return ref.at[b, rows, group(ref.shape[2], h)]
        if name in ("z", "own"):
            columns = pl.ds(column, plan.loads[name][1][-1])
            return ref.at[b, rows, group(ref.shape[2], h), columns]
        if name == "segments":
            return ref.at[b, rows]
        one = ref.shape[:3] == (1, 1, 1)
        chunk = lax.div(rows.start, jnp.int32(CHUNK))
        return ref.at[(0, 0, 0) if one else (b, group(ref.shape[1], h), chunk)]

    def fill(step, _):
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(r.empty.at[slot])

        rows = pl.ds(chunk_of(plan, step) * CHUNK, CHUNK)
        for name, (count, _, _) in plan.loads.items():
            for index in range(count):
                to = getattr(r, f"{name}_s").at[slot, index]
                plgpu.copy_gmem_to_smem(source(name, index, rows), to, r.full.at[slot])
        return ()

    def drain(step, _):  # jax 0.11.2's interpreter wants each barrier that completes waited for
        plgpu.barrier_wait(r.empty.at[lax.rem(step, jnp.int32(stages))])
        return ()

    zero = r.numbers[0]
    lax.fori_loop(zero, plan.chunks, fill, ())
    if interpret:
        lax.fori_loop(max(plan.chunks - stages, 0), plan.chunks, drain, ())
