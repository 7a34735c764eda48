"""The feed-forward layer of a transformer block on pictures, which also mixes neighbours."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.conv2d import conv2d


class ConvMlp(nnx.Module):
    """act(conv(before(x W_1 + b_1))) W_2 + b_2 (PVT v2, arXiv 2106.13797, section 3.2).

    The convolution is 3 x 3 for each channel by itself, with a bias and zeros around the picture of
    `grid` places, whose positions it tells. before: "relu" in PVT v2's linear variant as released.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        grid: tuple[int, int],
        before: Literal["none", "relu"] = "none",
        kind: Activation = "gelu_exact",
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.grid, self.before, self.activation = grid, before, kind
        self.expand = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.conv = conv2d(hidden, hidden, 3, groups=hidden, dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        y = ACTIVATIONS[self.before](self.expand(x))
        y = self.conv(y.reshape(y.shape[0], *self.grid, y.shape[2])).reshape(y.shape)
        y = self.dropout(ACTIVATIONS[self.activation](y), deterministic=rngs is None, rngs=rngs)
        return self.contract(y)
