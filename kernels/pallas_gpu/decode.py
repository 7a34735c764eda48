"""One token of a recurrence on Hopper: see `kernels.decode_step`.

A CTA, one warpgroup, takes up to 64 columns of a head's state into shared memory by TMA, changes
them there, 64 rows at a time in registers, and sends them back where they were. There is no matrix
product: it waits for memory, and several CTAs of an SM wait side by side.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.wgmma import COLUMNS, LAYOUT, ROWS, by_column, by_row, constant, shared

BLOCK = 64
"""Rows held in registers at a time."""
WIDTHS = (64, 32, 16, 8)
"""Columns of a CTA."""
MOST = 512
"""The most rows: 128 kB of shared memory."""
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def refuse(rows: int, columns: int) -> str | None:
    """Why this kernel does not take states [rows, columns], and what to do; None where it does."""
    if rows % 8 or columns % 8 or rows > MOST:
        return (
            f"a state is {rows} x {columns}; the Hopper kernel takes multiples of 8, and up to "
            f"{MOST} rows: use backend='xla'"
        )
    return None


def step(state, keys, values, *, interpret):
    """See `kernels.decode_step`."""
    count, rows, columns = state.shape
    width = next(w for w in WIDTHS if columns % w == 0)
    blocks = [(at, min(BLOCK, rows - at)) for at in range(0, rows, BLOCK)]
    delta = values.shape[1] > 1
    keys = jnp.pad(keys, [(0, 0), (0, 0), (0, -rows % BLOCK)])

    def body(state, keys, values, *refs):
        *left, out, held, come = refs
        left = left[0] if left else state
        n, lanes = lax.axis_index("head"), pl.ds(lax.axis_index("columns") * width, width)
        for at, size in blocks:
            here = pl.ds(at, size)
            plgpu.copy_gmem_to_smem(state.at[n, here, lanes], held.at[here], come)
        change = plgpu.load(values.at[n, 0, lanes], layout=COLUMNS, optimized=False)
        plgpu.barrier_wait(come)

        def key(i, at):
            x = plgpu.load(keys.at[n, i, pl.ds(at, BLOCK)], layout=ROWS, optimized=False)
            return by_row(x, width)

        def faded(at, size):
            x = plgpu.load(held.at[pl.ds(at, BLOCK)], layout=LAYOUT)
            if size < BLOCK:  # nothing was put into the last rows
                row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, width), 0, layout=LAYOUT)
                x = jnp.where(row < size, x, 0.0)
            return x * key(2, at)

        none = constant(0.0, (BLOCK, width))
        if delta:
            found = none
            for at, size in blocks:
                found += key(1, at) * faded(at, size)
            beta = plgpu.load(values.at[n, 1, lanes], layout=COLUMNS, optimized=False)
            change = beta * (change - found.sum(axis=0))
        read = none
        for at, size in blocks:
            new = faded(at, size) + key(1, at) * by_column(change, BLOCK)
            held.at[pl.ds(at, BLOCK)][...] = new
            read += key(0, at) * new
        plgpu.commit_smem()
        for at, size in blocks:
            here = pl.ds(at, size)
            plgpu.copy_smem_to_gmem(held.at[here], left.at[n, here, lanes])
        out.at[n, lanes][...] = read.sum(axis=0)
        plgpu.wait_smem_to_gmem(0)

    how = {
        "grid": (columns // width, count),
        "grid_names": ("columns", "head"),
        "scratch_types": [
            shared((len(blocks) * BLOCK, width), jnp.float32),
            plgpu.Barrier(num_arrivals=len(blocks)),
        ],
        "compiler_params": PARAMS,
        "interpret": interpret,
    }
    made = jax.ShapeDtypeStruct((count, columns), jnp.float32)
    if jax.typeof(state).manual_axis_type.varying:  # in shard_map jax passes on no reference
        new = jax.ShapeDtypeStruct(state.shape, jnp.float32)
        left, out = launch(body, state, keys, values, out_type=(new, made), **how)
        return out, left
    place = jax.new_ref(state)
    out = launch(body, place, keys, values, out_type=made, **how)
    return out, jax.freeze(place)
