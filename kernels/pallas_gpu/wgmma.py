"""Matrix products of a warpgroup, written once for Hopper and for the interpreter.

The interpreter of Mosaic GPU (`plgpu.InterpretGPUParams`, jax 0.11.2 and 0.12) lacks two things
that kernels here need: a left operand held in registers, and an accumulator that begins with a
given value. Each has a stand-in below, taken where the kernel is interpreted and only there; both
give the same numbers. The interpreter runs a product where it is issued and does not check its
reads of shared memory for races: that every operand's barrier is waited for has to be read off the
kernel.

`plgpu.ACC` held in `pl.run_scoped` around a loop, and read with `acc[...]`, works in both worlds.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LAYOUT = plgpu.Layout.WGMMA
"""How a warpgroup holds a matrix [64 n, columns] that a product made or takes."""
ROWS, COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)
"""The layouts of a vector with a number per row, and per column, of such a matrix."""


def tiles(columns: int, dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of a shared-memory matrix [..., rows, columns] that is an operand or a TMA tile.

    Swizzled over rows of up to 128 bytes. Both operands of a product need the same swizzle, so
    both rows are of at least 128 bytes or both of the same number.
    """
    swizzle = min(128, columns * jnp.dtype(dtype).itemsize)
    return (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


def shared(shape: tuple[int, ...], dtype) -> pl.MemoryRef:
    """Shared memory for a matrix, or an array of matrices, laid out with `tiles`."""
    return plgpu.SMEM(shape, dtype, transforms=tiles(shape[-1], dtype))


def constant(value: float, shape: tuple[int, ...], layout=LAYOUT) -> jax.Array:
    """float32 registers filled with a number."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def matmul(shape: tuple[int, int], *pairs) -> jax.Array:
    """sum a @ b over the (a, b) of `pairs`, in fresh float32 registers [M, N]; waits for it.

    a: shared memory [M, K] or what `left` gives. b: shared memory [K, N]. Either may be a
    transposed reference, `ref.transpose((1, 0))`.
    """

    def sum_up(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_matmul(acc: jax.Array, *pairs, interpret) -> jax.Array:
    """acc + sum a @ b for float32 registers `acc` [M, N]: as `matmul`, begun with `acc`."""
    if interpret:
        return acc + matmul(acc.shape, *pairs)

    def sum_up(ref):
        for a, b in pairs:
            plgpu.wgmma(ref, a, b)

    return pl.run_state(sum_up)(plgpu.WGMMAAccumulatorRef.init(acc))


def rounded(x, interpret):
    """float32 x as bfloat16 has it; where interpreted, in a way that XLA does not take for x."""
    if interpret:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def in_two(parts, x) -> None:
    """Puts float32 x into two matrices of shared memory, to 16 bits: x rounded, and what is left.

    All warps must have met since the last product that read there.
    """
    high = x.astype(jnp.bfloat16)
    parts[0][...] = high
    parts[1][...] = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()


def matmul_in_two(x, y) -> jax.Array:
    """x @ y of matrices that `in_two` made, less what both small parts give together."""
    shape = x[0].shape[0], y[0].shape[1]
    return matmul(shape, *((x[a], y[b]) for a, b in ((0, 0), (0, 1), (1, 0))))


def spare(shape: tuple[int, ...], dtype, interpret) -> list:
    """Scratch for `left`, as a list to append to `scratch_types`: empty on hardware."""
    return [shared(shape, dtype)] if interpret else []


def left(x: jax.Array, scratch=None):
    """Registers [M, K] as the left operand of a product.

    scratch: shared memory [M, K] of the calling warpgroup where the kernel is interpreted, else
    None. What is in it is overwritten: products with an earlier operand there must be over, as
    they are after `matmul` and `add_matmul`.
    """
    if scratch is None:
        return x
    scratch[...] = x
    plgpu.commit_smem()
    return scratch


def by_row(vector, columns: int):
    """[rows, columns] with a number per row."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def by_column(vector, rows: int):
    """[rows, columns] with a number per column."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])
