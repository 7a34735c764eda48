"""What Hopper's kernels take: bfloat16, and heads whose keys and values have 64 channels, or 128.

Other channels are filled up with zeros, which change nothing. Values of more channels are several
heads that share queries and keys; what these get of each is added up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

WIDTHS = 64, 128
"""Channels of a head that the kernels take."""


class Fit(NamedTuple):
    """How heads with keys of `rank` and values of `dim` channels are taken: `parts` of `width`."""

    rank: int
    dim: int
    width: int
    parts: int

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, T, H, R] as [B, T, H, width]."""
        return filled(x, 3, self.width)

    def values(self, x: jax.Array) -> jax.Array:
        """[B, T, H, Dv] as [B, T, H parts, width]."""
        x = filled(x, 3, self.parts * self.width)
        return rearrange(x, "b t h (p d) -> b t (h p) d", p=self.parts)

    def numbers(self, x: jax.Array) -> jax.Array:
        """[B, H, ...] as [B, H parts, ...]."""
        return x if self.parts == 1 else jnp.repeat(x, self.parts, axis=1)

    def state(self, S: jax.Array | None) -> jax.Array | None:
        """[B, H, R, Dv] as [B, H parts, width, width]."""
        if S is None:
            return None
        S = filled(filled(S, 2, self.width), 3, self.parts * self.width)
        return rearrange(S, "b h r (p d) -> b (h p) r d", p=self.parts)

    def of_keys(self, x: jax.Array) -> jax.Array:
        """The sum [B, T, H, R] of what each part gives [B, T, H parts, width]."""
        if self.parts > 1:
            x = rearrange(x, "b t (h p) d -> b t h p d", p=self.parts).astype(jnp.float32).sum(3)
        return x[..., : self.rank]

    def of_numbers(self, x: jax.Array) -> jax.Array:
        """The sum [B, H, T] of what each part gives [B, H parts, T]."""
        return x if self.parts == 1 else rearrange(x, "b (h p) t -> b h t p", p=self.parts).sum(3)

    def of_values(self, x: jax.Array) -> jax.Array:
        """[B, T, H parts, width] as [B, T, H, Dv]."""
        return rearrange(x, "b t (h p) d -> b t h (p d)", p=self.parts)[..., : self.dim]

    def of_state(self, S: jax.Array) -> jax.Array:
        """[B, H parts, width, width] as [B, H, R, Dv]."""
        S = rearrange(S, "b (h p) r d -> b h r (p d)", p=self.parts)
        return S[:, :, : self.rank, : self.dim]


def fit(rank: int, dim: int) -> Fit:
    """How heads with keys of `rank` channels, at most the last of `WIDTHS`, are taken."""
    width = whole(rank)
    return Fit(rank, dim, width, -(-dim // width))


def refuse_dtype(**arrays) -> str | None:
    """Why the kernels do not take what products are made of, by name, and what to do, or None."""
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16:
            return (
                f"{name} is {jnp.dtype(x.dtype).name} and the Hopper kernels take bfloat16: cast "
                "q, k and v, or use backend='xla'"
            )
    return None


def whole(channels: int) -> int:
    """The least of `WIDTHS` that has room for as many."""
    return min(width for width in WIDTHS if width >= channels)


def filled(x: jax.Array | None, axis: int, width: int) -> jax.Array | None:
    """x with zeros behind, up to `width`, or as it is if it has as many."""
    if x is None or x.shape[axis] >= width:
        return x
    more = [(0, 0)] * x.ndim
    more[axis] = 0, width - x.shape[axis]
    return jnp.pad(x, more)
