"""Normalisation by name, and over batches with statistics that are carried along."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float

SequenceNorm = Literal["layernorm", "rmsnorm"]
NormType = Literal["layernorm", "rmsnorm", "groupnorm", "none"]


def make_norm(
    kind: NormType, width: int, *, epsilon: float = 1e-6, dtype: Any, rngs: nnx.Rngs
) -> nnx.Module:
    """ "layernorm": (x - mean) / sqrt(var + epsilon) * scale + bias (arXiv 1607.06450).
    "rmsnorm": x / sqrt(mean(x^2) + epsilon) * scale (arXiv 1910.07467, equation 4).
    "groupnorm": as "layernorm", but mean and variance are those of all positions of an example
    together (one group of arXiv 1803.08494, as in PoolFormer). "none": x.

    Statistics are float32 over the last axis, var the mean of (x - mean)^2; the result has `dtype`.
    """
    given = {"epsilon": epsilon, "dtype": dtype, "rngs": rngs}
    if kind == "none":
        return Same()
    if kind == "rmsnorm":
        return nnx.RMSNorm(width, **given)
    if kind == "groupnorm":
        return nnx.GroupNorm(width, num_groups=1, use_fast_variance=False, **given)
    return nnx.LayerNorm(width, use_fast_variance=False, **given)


class Same(nnx.Module):
    """x."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x."""
        return x


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias, a mean per channel (arXiv 1502.03167).

    In training (with `rngs`) mean and variance are those of the batch, of all devices that it is
    spread over, and the running ones follow them by a tenth of the way; otherwise they are the
    running ones. Those are no parameters: they are saved with a model, and not trained. `begin` is
    what the scales begin with: 0 makes a residual branch begin as nothing (arXiv 1706.02677, 5.1).
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float = 1e-5,
        begin: float = 1.0,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.BatchNorm(
            width, momentum=0.9, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs,
            scale_init=nnx.initializers.constant(begin),
        )  # fmt: skip

    def __call__(self, x: Float[Array, "... E"], *, rngs: nnx.Rngs | None) -> Float[Array, "... E"]:
        """`rngs` says that this is training; nothing is drawn."""
        return self.norm(x, use_running_average=rngs is None)


class LinearNorm(nnx.Module):
    """norm(x W + b): "batchnorm", for which b is nothing and left out by default, or "none"."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        norm: Literal["none", "batchnorm"] = "batchnorm",
        use_bias: bool = False,
        begin: float = 1.0,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.xavier_uniform()
        self.linear = nnx.Linear(
            width, out, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs
        )
        self.normed = norm == "batchnorm"
        if self.normed:
            self.norm = BatchNorm(out, begin=begin, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... E"], *, rngs: nnx.Rngs | None) -> Float[Array, "... F"]:
        """`rngs` says that this is training; `begin`: see `BatchNorm`."""
        x = self.linear(x)
        return self.norm(x, rngs=rngs) if self.normed else x
