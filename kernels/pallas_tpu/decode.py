"""One token of a recurrence on TPU: see `kernels.decode_step`.

A step of the grid takes some heads' states from HBM and writes them back where they were. A key is
a column beside the state's rows, a value a line over its lanes: nothing is multiplied as a matrix.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.linear_plan import f32
from kernels.varying import alike

BLOCK = 1 << 20
"""Bytes of a block of states, as they lie in VMEM; four are there at a time."""
MOST = 16
"""The most heads of a block: each is a copy of the code."""


def refuse(rows: int, columns: int) -> str | None:
    """Why this kernel does not take states [rows, columns], and what to do; None where it does."""
    if _bytes(rows, columns) > BLOCK:
        return f"a state of {rows} x {columns} is over {BLOCK} bytes: use backend='xla'"
    return None


def step(state, keys, values, *, interpret):
    """See `kernels.decode_step`."""
    count, rows, columns = state.shape
    together = _together(count, rows, columns)

    def kernel(state, keys, values, left, out):
        for a in range(together):
            q, k, decay = (jnp.transpose(keys[a, i : i + 1]) for i in range(3))
            new, change = decay * state[a], values[a, :1]
            if values.shape[1] > 1:
                change = values[a, 1:] * (change - jnp.sum(k * new, axis=0, keepdims=True))
            new += k * change
            left[a] = new
            out[a] = jnp.sum(q * new, axis=0, keepdims=True)

    def block(x):
        return pl.BlockSpec((together, *x.shape[1:]), lambda n: (n, 0, 0))

    arrays = alike([state, keys, values])
    varies = jax.typeof(arrays[0]).manual_axis_type  # inside a shard_map
    shapes = [
        jax.ShapeDtypeStruct(shape, f32, manual_axis_type=varies)
        for shape in (state.shape, (count, 1, columns))
    ]
    left, out = pl.pallas_call(
        kernel,
        grid=(count // together,),
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in shapes],
        out_shape=shapes,
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret or False,
    )(*arrays)
    return out[:, 0], left


def _together(count: int, rows: int, columns: int) -> int:
    """Heads of a block."""
    room = min(MOST, BLOCK // _bytes(rows, columns))
    return next(n for n in range(room, 0, -1) if count % n == 0)


def _bytes(rows: int, columns: int) -> int:
    return 4 * (-(-rows // 8) * 8) * (-(-columns // LANES) * LANES)
