"""The mean of the neighbours in a picture, in the place of attention."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_attn.attention.base import Cost, Mixer, on_map, refuse_context, refuse_mask
from efficient_attn.config import at_least, require
from kernels.dispatch import Path, run


class Pool(Mixer):
    """mean of x over the places around, less x itself (PoolFormer, arXiv 2111.11418, equation 4).

    The identity goes because a residual is added. As in the paper's algorithm 1, places beyond an
    edge of the picture do not count in the mean. Nothing is learned.
    """

    @dataclass(frozen=True)
    class Config:
        """size: side of the square that is averaged, an odd number; the paper's 3."""

        size: int = 3

        def __post_init__(self):
            at_least(self, 1, "size")
            require(self.size % 2 == 1, f"size={self.size} must be odd: as much on each side")

    paper = "MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418"
    supports = frozenset({"bidirectional", "grid"})
    on_grids = True

    def __init__(self, config, site, *, rngs, shared):
        self.config, self.site = config, site

    @classmethod
    def cost(cls, config, site, length):
        """Additions: size^2 E for each place. There are no multiply-adds."""
        return Cost(config.size**2 * length * site.width, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("pool", context)
        refuse_mask("pool", mask, self.supports)
        return run("pool", self.site.backend, {"xla": Path(self._xla)}, (x,), {})

    def _xla(self, x):
        """Rows first, then columns, summed in float32."""
        total = on_map(x, self.site).astype(jnp.float32)
        number = np.ones((), np.float32)
        for axis, side in enumerate(self.site.sides, start=1):
            total = _sums(total, self.config.size, axis)
            number = number[..., None] * _neighbours(side, self.config.size)
        mean = total / jnp.asarray(number)[None, :, :, None]
        return mean.reshape(x.shape).astype(x.dtype) - x


def _sums(x, size: int, axis: int):
    """Sums over `size` places along an axis, around each; nothing beyond its ends."""
    pad, side = [(0, 0)] * x.ndim, x.shape[axis]
    pad[axis] = (size // 2, size // 2)
    padded = jnp.pad(x, pad)
    parts = [lax.slice_in_dim(padded, i, i + side, axis=axis) for i in range(size)]
    return sum(parts[1:], parts[0])


def _neighbours(side: int, size: int) -> np.ndarray:
    """[side]: how many of the places summed by `_sums` there are."""
    at, reach = np.arange(side), size // 2
    last = np.minimum(at + reach, side - 1)
    return (last - np.maximum(at - reach, 0) + 1).astype(np.float32)
