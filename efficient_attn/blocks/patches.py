"""Steps from an image, or a map, to a coarser map; each says by `sides` what it makes of one."""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.norm import NormType, make_norm


class Patches(nnx.Module):
    """norm(conv(x)): windows of `kernel` at every `stride`, which overlap where they are larger."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int,
        *,
        stride: int,
        around: int,
        norm: NormType = "layernorm",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.kernel, self.stride, self.around = kernel, stride, around
        pad = (around, around)
        self.conv = nnx.Conv(
            width, out, (kernel, kernel), strides=stride, padding=(pad, pad), dtype=dtype, rngs=rngs
        )
        self.norm = make_norm(norm, out, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w E"]:
        """The same in training and evaluation."""
        return self.norm(self.conv(x))

    def sides(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the map that it makes of one of `grid`."""
        rows, columns = ((side + 2 * self.around - self.kernel) // self.stride + 1 for side in grid)
        return rows, columns


class Merge(nnx.Module):
    """norm(four neighbours, one after another) W: [B,H,W,E] -> [B,ceil(H/2),ceil(W/2),`out`].

    An odd side is filled up with zeros.
    """

    def __init__(self, width: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = make_norm("layernorm", 4 * width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.reduction = nnx.Linear(4 * width, out, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W E"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """The same in training and evaluation."""
        x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
        x = rearrange(x, "b (h r) (w c) e -> b h w (c r e)", r=2, c=2)
        return self.reduction(self.norm(x))

    def sides(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the map that it makes of one of `grid`."""
        return -(-grid[0] // 2), -(-grid[1] // 2)
