"""A stack of transformer blocks, each with the mixer that the attention expression names."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_attn import attention
from efficient_attn.attention import Choice, Site
from efficient_attn.config import require
from efficient_attn.layers.mlp import Mlp
from kernels import Mask


@dataclass(frozen=True)
class Shape:
    """What a stack is, whatever the attention.

    mlp_ratio: hidden width of the feed-forward layer over the width; 1 is Lite Transformer's flat
    one.
    norm: "pre" normalises before each branch and once at the end, "post" after each residual sum.
    remat: recompute each block in the backward pass rather than keep its activations.
    """

    depth: int = 4
    width: int = 64
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    norm: Literal["pre", "post"] = "pre"
    remat: bool = False

    def __post_init__(self):
        for name in ("depth", "width", "heads", "mlp_ratio"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or the norm after the sum."""

    def __init__(
        self,
        choice: Choice,
        shape: Shape,
        site: Site,
        *,
        needs: Iterable[str],
        rngs: nnx.Rngs,
        shared,
    ):
        self.shape = shape
        self.mixer = attention.build(choice, site, needs=needs, rngs=rngs, shared=shared)
        hidden = round(shape.mlp_ratio * shape.width)
        self.mlp = Mlp(shape.width, hidden, dropout=shape.dropout, dtype=site.dtype, rngs=rngs)
        self.mixer_norm = nnx.LayerNorm(shape.width, dtype=site.dtype, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(shape.width, dtype=site.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(shape.dropout)

    def __call__(self, x, *, mask: Mask, positions, rngs: nnx.Rngs | None, shared):
        """[B,T,E] -> [B,T,E]."""
        mix = lambda y: self.mixer(  # noqa: E731
            y, mask=mask, positions=positions, rngs=rngs, shared=shared
        )
        x = self._residual(x, mix, self.mixer_norm, rngs)
        return self._residual(x, lambda y: self.mlp(y, rngs=rngs), self.mlp_norm, rngs)

    def _residual(self, x, branch, norm, rngs):
        y = branch(norm(x)) if self.shape.norm == "pre" else branch(x)
        y = x + self.dropout(y, deterministic=rngs is None, rngs=rngs)
        return y if self.shape.norm == "pre" else norm(y)


class Stack(nnx.Module):
    """`shape.depth` blocks, and the modules that their mixers share."""

    def __init__(
        self, expression: str, shape: Shape, site: Site, *, needs: Iterable[str], rngs: nnx.Rngs
    ):
        self.shape = shape
        shared: dict[str, nnx.Module] = {}
        blocks = [
            Block(choice, shape, replace(site, layer=layer), needs=needs, rngs=rngs, shared=shared)
            for layer, choice in enumerate(attention.pattern(expression, shape.depth))
        ]
        self.blocks = nnx.List(blocks)
        self.shared = nnx.Dict(shared)
        if shape.norm == "pre":
            self.norm = nnx.LayerNorm(shape.width, dtype=site.dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        mask: Mask,
        positions: Int[Array, "#B T"] | None = None,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        run = nnx.remat(_run) if self.shape.remat else _run
        for block in self.blocks:
            x = run(block, x, mask, positions, rngs, self.shared)
        return self.norm(x) if self.shape.norm == "pre" else x


def _run(block, x, mask, positions, rngs, shared):
    return block(x, mask=mask, positions=positions, rngs=rngs, shared=shared)
