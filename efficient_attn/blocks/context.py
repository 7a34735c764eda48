"""EfficientViT's block: attention for the context, an inverted residual for what is near."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn import attention
from efficient_attn.attention import Choice, Site
from efficient_attn.blocks.inverted_residual import Inside, InvertedResidual, Skip
from efficient_attn.layers.norm import BatchNorm
from kernels import Mask


class ContextBlock(nnx.Module):
    """x + norm(mixer(x)), then x + local(x), an inverted residual (arXiv 2205.14756, figure 2)."""

    def __init__(
        self, choice: Choice, site: Site, *, hidden: int, inside: Inside, rngs: nnx.Rngs, shared
    ):
        self.mixer = attention.build(
            choice, site, needs={"bidirectional"}, rngs=rngs, shared=shared
        )
        self.norm = BatchNorm(site.width, epsilon=inside.epsilon, dtype=site.dtype, rngs=rngs)
        self.skip = Skip(True, inside.drop_path)
        self.local = InvertedResidual(
            site.width, site.width, hidden=hidden, inside=inside, dtype=site.dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B H W E"], *, rngs: nnx.Rngs | None, shared
    ) -> Float[Array, "B H W E"]:
        """Without `rngs` nothing is dropped."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        y = self.mixer(tokens, mask=Mask(), rngs=rngs, shared=shared).reshape(x.shape)
        return self.local(self.skip(x, self.norm(y, rngs=rngs), rngs=rngs), rngs=rngs)


class ContextStage(nnx.Module):
    """A block that halves the resolution, context blocks, and what their mixers share."""

    layers: Any

    def __init__(self, first: Any, blocks: list[ContextBlock], shared: dict[str, nnx.Module]):
        self.layers = nnx.List([first, *blocks])
        self.shared = nnx.Dict(shared)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w E"]:
        """Without `rngs` nothing is dropped."""
        first, *blocks = self.layers
        x = first(x, rngs=rngs)
        for block in blocks:
            x = block(x, rngs=rngs, shared=self.shared)
        return x
