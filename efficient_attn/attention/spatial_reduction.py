"""Exact attention to a smaller picture of the keys and values."""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.attention.base import Cost, Mixer, on_map, refuse_context, refuse_mask
from efficient_attn.attention.multihead import MultiHead
from efficient_attn.attention.softmax import Softmax
from efficient_attn.config import at_least
from efficient_attn.layers.activations import ACTIVATIONS
from efficient_attn.layers.norm import make_norm
from kernels import Mask


class SpatialReduction(Mixer):
    """Softmax attention whose keys and values are projected from a reduced x (PVT v2, 2106.13797).

    "convolution": norm(conv(x)), as PVT has it (arXiv 2102.12122, equations 2 and 3); T^2 / R^2
    logits. As in the released code rows and columns beyond the last whole window are not seen; a
    picture smaller than the window is filled up with zeros. "pool": gelu(norm(conv_1x1(means))),
    linear SRA (PVT v2, section 3.3): linear in T. Positions are not added, whatever the site says.
    """

    @dataclass(frozen=True)
    class Config:
        """ratio: R, side and stride of the convolution; 1 leaves it out, and the norm.
        reduction: "convolution", or "pool", linear SRA.
        size: side of the picture that "pool" makes by means over equal shares; the paper's 7.
        """

        ratio: int = 2
        reduction: Literal["convolution", "pool"] = "convolution"
        size: int = 7

        def __post_init__(self):
            at_least(self, 1, "ratio", "size")

        @property
        def window(self) -> int:
            """Side of the convolution."""
            return self.ratio if self.reduction == "convolution" else 1

        @property
        def reduces(self) -> bool:
            """Whether there is a convolution."""
            return self.reduction == "pool" or self.ratio > 1

    paper = "PVT v2: Improved Baselines with Pyramid Vision Transformer, arXiv 2106.13797"
    supports = frozenset({"bidirectional", "grid"})
    on_grids = True

    def __init__(self, config, site, *, rngs, shared):
        self.config, self.site = config, site
        core = Softmax(Softmax.Config(), replace(site, positions="none"), rngs=rngs, shared=shared)
        self.attention = MultiHead(core, capabilities=Softmax.supports, rngs=rngs)
        if config.reduces:
            side = (config.window, config.window)
            self.reduce = nnx.Conv(
                site.width, site.width, side, strides=side, padding="VALID", dtype=site.dtype,
                rngs=rngs,
            )  # fmt: skip
            self.norm = make_norm(
                "layernorm", site.width, epsilon=1e-5, dtype=site.dtype, rngs=rngs
            )

    @classmethod
    def cost(cls, config, site, length):
        """Projections, the reduction to S places, and 2 T S E."""
        (rows, columns), size, width = site.sides, config.size, site.width
        if config.reduction == "pool":
            kept = size**2
            reduction = size * columns * (rows + size) * width + kept * width**2
        else:
            kept = _windows(rows, config.ratio) * _windows(columns, config.ratio)
            reduction = kept * config.ratio**2 * width**2 if config.reduces else 0
        projections = 2 * (length + kept) * width**2
        return Cost(projections + reduction + 2 * length * kept * width, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("spatial_reduction", context)
        refuse_mask("spatial_reduction", mask, self.supports)
        return self.attention(x, self._reduced(x), mask=Mask(), shared=shared)

    def _reduced(self, x):
        """[B,T,E] -> [B,S,E]."""
        config = self.config
        if not config.reduces:
            return x
        small = on_map(x, self.site)
        if config.reduction == "pool":
            rows, columns = (_shares(side, config.size) for side in self.site.sides)
            small = jnp.einsum("ir,brce->bice", rows.astype(x.dtype), small)
            small = jnp.einsum("jc,bice->bije", columns.astype(x.dtype), small)
        else:
            fill = [(0, max(0, config.ratio - side)) for side in self.site.sides]
            small = jnp.pad(small, [(0, 0), *fill, (0, 0)])
        small = self.reduce(small)
        small = self.norm(small.reshape(x.shape[0], -1, x.shape[2]))
        return ACTIVATIONS["gelu_exact"](small) if config.reduction == "pool" else small


def _windows(side: int, ratio: int) -> int:
    return max(side, ratio) // ratio


def _shares(side: int, size: int) -> np.ndarray:
    """[size, side]: the matrix of means over `size` nearly equal shares, which may overlap by one.

    Share i holds the places from floor(i side / size) up to ceil((i + 1) side / size).
    """
    share, at = np.arange(size)[:, None], np.arange(side)[None]
    inside = (at >= share * side // size) & (at < -(-(share + 1) * side // size))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
