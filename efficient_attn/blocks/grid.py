"""Transformer blocks on maps of features."""

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Site
from efficient_attn.blocks.stack import Stack
from efficient_attn.blocks.transformer import GridShape
from kernels import Mask


class GridStack(nnx.Module):
    """A `Stack` over the places of a map, row by row: [B,H,W,E] -> [B,H,W,E].

    `site.grid` is (H, W), so that mechanisms that work on pictures do too. `part`: see `Stack`.
    """

    def __init__(
        self,
        expression: str,
        shape: GridShape,
        site: Site,
        *,
        rngs: nnx.Rngs,
        part: tuple[int, int] | None = None,
    ):
        self.stack = Stack(expression, shape, site, needs={"bidirectional"}, rngs=rngs, part=part)

    def __call__(
        self, x: Float[Array, "B H W E"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B H W E"]:
        """Without `rngs` nothing is dropped."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.stack(tokens, mask=Mask(), rngs=rngs).reshape(x.shape)
