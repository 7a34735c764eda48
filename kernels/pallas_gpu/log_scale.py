"""The scales of FAVOR+'s features on Hopper: each token's largest exponent."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.fit import filled, whole
from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.pipeline import PARAMS
from kernels.pallas_gpu.plan import CHUNK
from kernels.pallas_gpu.wgmma import ROWS, constant, matmul, shared

BLOCK = 128
"""Features whose logits are held at a time."""


def log_scale(x: jax.Array, weight: jax.Array, half: float, *, interpret: Any) -> jax.Array:
    """max_r <x, w_r> - half |x|^2 of x [B, S, H, D], float32 [B, H, S]; weight is [R, D].

    The weight is rounded to bfloat16: any number near the largest exponent serves as well.
    """
    square = half_square(x, half)
    fit = whole(x.shape[-1])
    x, weight = filled(x, -1, fit), filled(weight, -1, fit).astype(jnp.bfloat16)
    weight = jnp.pad(weight, [(0, -weight.shape[0] % BLOCK), (0, 0)], mode="edge")
    batch, length, heads, depth = x.shape
    chunks, blocks = length // CHUNK, weight.shape[0] // BLOCK
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

            def of_block(block, most):
                logits = matmul((CHUNK, BLOCK), (x_s, weight_s.at[block].transpose((1, 0))))
                return jnp.maximum(most, logits.max(axis=1))

            none = constant(-jnp.inf, (CHUNK,), ROWS)
            most = lax.fori_loop(0, blocks, of_block, none)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s[...] = most
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out.at[b, h, rows])
            return ()

        lax.fori_loop(0, several, step, ())
        plgpu.wait_smem_to_gmem(0)

    scratch = [shared((CHUNK, depth), jnp.bfloat16), shared((blocks, BLOCK, depth), jnp.bfloat16)]
    scratch += [plgpu.SMEM((CHUNK,), jnp.float32), plgpu.Barrier(), plgpu.Barrier()]
    most = launch(
        body, x, weight.reshape(blocks, BLOCK, depth),
        out_type=jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        grid=(chunks // several, heads, batch),
        grid_names=("chunks", "head", "batch"),
        scratch_types=scratch,
        compiler_params=PARAMS,
        interpret=interpret,
    )  # fmt: skip
    return most - square


def half_square(x: jax.Array, half: float) -> jax.Array:
    """half |x|^2 of x [B, S, H, D], float32 [B, H, S]."""
    return half * jnp.einsum("bshd,bshd->bhs", x, x, preferred_element_type=jnp.float32)
