"""The feed-forward layer of a transformer block."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.activations import ACTIVATIONS
from efficient_attn.layers.norm import BatchNorm

MlpType = Literal["gelu", "gelu_exact", "relu", "silu", "hardswish", "swiglu", "geglu"]

GATES = {"swiglu": "silu", "geglu": "gelu"}


class Mlp(nnx.Module):
    """Linear, activation, dropout, linear: [..., E] -> [..., E].

    "gelu", "relu" and the other activations: act(x W_1 + b_1) W_2 + b_2, 2 E F + F + E parameters
    for `hidden` = F. F = 4 E is the usual bottleneck; F = E is Lite
    Transformer's flat feed-forward layer (arXiv 2004.11886, section 3).
    "swiglu", "geglu": (act(x W) * x V) W_2 with act = silu or gelu and no biases (arXiv
    2002.05202, equation 6), 3 E F parameters: F two thirds as wide costs what the plain ones do.
    norm: "batchnorm" follows both linear layers, as in networks of convolutions; the scales of the
    second begin with `begin`. use_bias=False leaves out b_1 and b_2.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: MlpType = "gelu",
        norm: Literal["none", "batchnorm"] = "none",
        use_bias: bool = True,
        begin: float = 1.0,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.activation = ACTIVATIONS[GATES.get(kind, kind)]
        self.gated = kind in GATES
        self.normed = norm == "batchnorm"
        bias = use_bias and not self.gated
        self.expand = nnx.Linear(width, hidden, use_bias=bias, dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(hidden, width, use_bias=bias, dtype=dtype, rngs=rngs)
        if self.gated:
            self.gate = nnx.Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        if self.normed:
            self.expand_norm = BatchNorm(hidden, dtype=dtype, rngs=rngs)
            self.contract_norm = BatchNorm(width, begin=begin, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        y = self.expand(x)
        y = self.expand_norm(y, rngs=rngs) if self.normed else y
        y = self.activation(self.gate(x)) * y if self.gated else self.activation(y)
        y = self.contract(self.dropout(y, deterministic=rngs is None, rngs=rngs))
        return self.contract_norm(y, rngs=rngs) if self.normed else y
