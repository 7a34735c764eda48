"""Normalisation by name: LayerNorm or RMSNorm."""

from typing import Any, Literal

from flax import nnx

NormType = Literal["layernorm", "rmsnorm"]


def make_norm(kind: NormType, width: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """ "layernorm": (x - mean) / sqrt(var + 1e-6) * scale + bias (arXiv 1607.06450).
    "rmsnorm": x / sqrt(mean(x^2) + 1e-6) * scale (arXiv 1910.07467, equation 4).

    Statistics are float32 over the last axis, var the mean of (x - mean)^2; the result has `dtype`.
    """
    if kind == "rmsnorm":
        return nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(width, use_fast_variance=False, dtype=dtype, rngs=rngs)
