"""The scales of FAVOR+'s features on Hopper: each token's largest exponent."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.plan import CHUNK
from kernels.pallas_gpu.stream import (
    PARAMS,
)
from kernels.pallas_gpu.wgmma import (
    matmul,
    shared,
)


def log_scale(x: jax.Array, weight: jax.Array, half: float, *, interpret: Any) -> jax.Array:
    """max_r <x, w_r> - half |x|^2 of x [B, S, H, D], float32 [B, H, S]; weight is [R, D]."""
    batch, length, heads, depth = x.shape
    rank, chunks = weight.shape[0], length // CHUNK
    several = next(n for n in (8, 4, 2, 1) if chunks % n == 0)

    def body(x, weight, out, x_s, weight_s, out_s, come, ready):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        plgpu.copy_gmem_to_smem(weight, weight_s, ready)

        def step(count, _):
            rows = pl.ds((lax.axis_index("chunks") * several + count) * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(x.at[b, rows, h], x_s, come)
            plgpu.barrier_wait(come)

            @pl.when(count == 0)
            def _():
                plgpu.barrier_wait(ready)

            most = None
            for first in range(0, rank, 128):
                some = weight_s.at[pl.ds(first, min(128, rank - first))]
                logits = matmul((CHUNK, some.shape[0]), (x_s, some.transpose((1, 0))))
                most = logits.max(axis=1) if most is None else jnp.maximum(most, logits.max(axis=1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s[...] = most
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out.at[b, h, rows])
            return ()

        lax.fori_loop(0, several, step, ())
        plgpu.wait_smem_to_gmem(0)

    scratch = [shared((CHUNK, depth), jnp.bfloat16), shared((rank, depth), jnp.bfloat16)]
    scratch += [plgpu.SMEM((CHUNK,), jnp.float32), plgpu.Barrier(), plgpu.Barrier()]
    most = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        grid=(chunks // several, heads, batch),
        grid_names=("chunks", "head", "batch"),
        scratch_types=scratch,
        compiler_params=PARAMS,
        **({"interpret": interpret} if interpret else {}),
    )(x, weight.astype(jnp.bfloat16))
    return most - half_square(x, half)


def half_square(x: jax.Array, half: float) -> jax.Array:
    """half |x|^2 of x [B, S, H, D], float32 [B, H, S]."""
    return half * jnp.einsum("bshd,bshd->bhs", x, x, preferred_element_type=jnp.float32)
