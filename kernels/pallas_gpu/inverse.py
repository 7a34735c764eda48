"""The triangular systems of the gated delta rule on Hopper, one chunk to a warpgroup.

    (I + A)^-1,    A_ij = beta_i <k_i, k_j> exp(row_i + column_j)    where i > j, of one segment

by the blocks of `kernels.gated_delta_rule.unit_lower_inverse`: from the inverses X of all diagonal
blocks of `half` rows those of twice as many, X - (X A) X, of X A what lies beside the diagonal
blocks. Factors of products, and the result, are held in two bfloat16 parts, 16 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.pipeline import PARAMS
from kernels.pallas_gpu.plan import CHUNK
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    ROWS,
    by_column,
    by_row,
    in_two,
    matmul,
    matmul_in_two,
    shared,
)

MATRIX = CHUNK, CHUNK


def inverses(
    k: jax.Array, *, beta: jax.Array, row: jax.Array, column: jax.Array,
    segments: jax.Array | None, interpret: Any,
) -> jax.Array:  # fmt: skip
    """bfloat16 [B, H, N, 2, C, C], of each chunk in two parts.

    k: bfloat16 [B, T, H, R]. beta, row, column: float32 [B, H, T]. segments: int32 [B, T].
    """
    batch, length, heads, depth = k.shape
    shape = batch, heads, length // CHUNK, 2, *MATRIX
    vectors = [rearrange(x, "b h (n c) -> b h n c", c=CHUNK) for x in (beta, row, column)]
    arrays = [k, *vectors, jnp.arange(CHUNK, dtype=jnp.int32)]
    if segments is not None:
        arrays.append(rearrange(segments, "b (n c) -> b n c", c=CHUNK))
    return launch(
        _body,
        *arrays,
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        grid=(length // CHUNK, heads, batch),
        grid_names=("chunk", "head", "batch"),
        scratch_types={
            "k_s": shared((CHUNK, depth), jnp.bfloat16),
            "parts_s": shared((3, 2, *MATRIX), jnp.bfloat16),
            "full": plgpu.Barrier(),
        },
        compiler_params=PARAMS,
        interpret=interpret,
    )


def _body(k, beta, row, column, numbers, *refs, k_s, parts_s, full):
    """refs: segments, if there are any, and the result."""
    *segments, out = refs
    b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    plgpu.copy_gmem_to_smem(k.at[b, pl.ds(n * CHUNK, CHUNK), h], k_s, full)
    i, j = _rows(numbers), _columns(numbers)
    seen = i > j
    if segments:
        ids = segments[0].at[b, n]
        seen &= _rows(ids) == _columns(ids)
    exponent = _rows(row.at[b, h, n]) + _columns(column.at[b, h, n])
    weight = jnp.exp(jnp.where(seen, exponent, -jnp.inf)) * _rows(beta.at[b, h, n])
    plgpu.barrier_wait(full)
    given = matmul(MATRIX, (k_s, k_s.transpose((1, 0)))) * weight
    given_s, made_s, beside_s = ((parts_s.at[n, 0], parts_s.at[n, 1]) for n in range(3))
    in_two(given_s, given)

    apart, half = i ^ j, 2
    made = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -given, 0.0))
    while half < CHUNK:
        in_two(made_s, made)
        beside = (apart >= half) & (apart < 2 * half)
        in_two(beside_s, jnp.where(beside, matmul_in_two(made_s, given_s), 0.0))
        made -= matmul_in_two(beside_s, made_s)
        plgpu.commit_smem()  # all four warps have read what is about to be overwritten
        half *= 2
    in_two(made_s, made)
    plgpu.copy_smem_to_gmem(parts_s.at[1], out.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def _rows(ref):
    """A vector of HBM with a number for each row of a matrix."""
    return by_row(plgpu.load(ref, layout=ROWS, optimized=False), CHUNK)


def _columns(ref):
    """A vector of HBM with a number for each column of a matrix."""
    return by_column(plgpu.load(ref, layout=COLUMNS, optimized=False), CHUNK)
