"""MobileViT's block: convolutions around a transformer that sees one place of each patch."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Site
from efficient_attn.blocks.stack import Stack
from efficient_attn.blocks.transformer import GridShape
from efficient_attn.layers.activations import Activation
from efficient_attn.layers.conv2d import ConvNorm, conv2d
from kernels import Mask


class PatchTransformer(nnx.Module):
    """local -> enter -> unfold -> transformer -> fold -> leave -> fuse: [B,H,W,C] -> [B,H,W,C].

    Unfolding makes P sequences of N out of N square patches of P places, the p-th of every patch's
    p-th place, row by row (arXiv 2110.02178, section 3.1, figure 1b). Mixers see each sequence by
    itself; norms over all positions ("groupnorm") see all P.

    fusion: "concatenate" (MobileViT): `local` is a convolution, `fuse` is one of what was given
    beside what comes out. "none" (V2, arXiv 2206.02680, section 3.3): `local` is depthwise, `leave`
    has no activation, and there is no `fuse`.
    """

    def __init__(
        self,
        expression: str,
        shape: GridShape,
        site: Site,
        *,
        width: int,
        patch: int,
        fusion: Literal["concatenate", "none"],
        activation: Activation,
        rngs: nnx.Rngs,
        part: tuple[int, int],
    ):
        """`site.grid` are the rows and columns of patches, `width` is C, `patch` their side."""
        conv = partial(ConvNorm, dtype=site.dtype, rngs=rngs)
        self.patch, self.fuses = patch, fusion == "concatenate"
        groups = 1 if self.fuses else width
        self.local = conv(width, width, 3, groups=groups, activation=activation)
        self.enter = conv2d(width, shape.width, use_bias=False, dtype=site.dtype, rngs=rngs)
        self.stack = Stack(
            expression, replace(shape, runs=patch**2), site,
            needs={"bidirectional"}, rngs=rngs, part=part,
        )  # fmt: skip
        self.leave = conv(shape.width, width, activation=activation if self.fuses else "none")
        if self.fuses:
            self.fuse = conv(2 * width, width, 3, activation=activation)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B H W C"]:
        """`rngs` says that this is training."""
        y, p = self.enter(self.local(x, rngs=rngs)), self.patch
        y = rearrange(y, "b (h p) (w q) e -> b (p q h w) e", p=p, q=p)
        y = self.stack(y, mask=Mask(), rngs=rngs)
        y = rearrange(y, "b (p q h w) e -> b (h p) (w q) e", p=p, q=p, h=x.shape[1] // p)
        y = self.leave(y, rngs=rngs)
        return self.fuse(jnp.concatenate([x, y], axis=-1), rngs=rngs) if self.fuses else y
