"""The feed-forward layer of a transformer block."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class Mlp(nnx.Module):
    """Linear, GELU, dropout, linear: [..., E] -> [..., E].

    `hidden` = 4 E is the usual bottleneck; `hidden` = E is Lite Transformer's flat feed-forward
    layer (arXiv 2004.11886, section 3).
    """

    def __init__(self, width: int, hidden: int, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.expand = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        x = jax.nn.gelu(self.expand(x))
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.contract(x)
