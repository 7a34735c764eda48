"""Convolutions of images, channels last, with the paddings of PyTorch's networks."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.norm import BatchNorm
from kernels import depthwise_conv


def conv2d(
    width: int,
    out: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    dtype: Any,
    rngs: nnx.Rngs,
) -> "nnx.Conv | DepthwiseConv":
    """[B,H,W,`width`] -> [B,h,w,`out`], h = (H + 2 (K // 2) - K) // stride + 1 for K = `kernel`.

    K // 2 zeros are around the image. Weights are drawn from N(0, 2 g / (K^2 `out`)), g = `groups`
    (He et al., arXiv 1502.01852, by the fan out), as light networks' are.
    """
    if groups == width > 1:
        return DepthwiseConv(
            width, out, kernel, stride=stride, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
    around = (kernel // 2, kernel // 2)
    init = nnx.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")
    return nnx.Conv(
        width, out, (kernel, kernel), strides=stride, padding=(around, around),
        feature_group_count=groups, use_bias=use_bias, dtype=dtype, rngs=rngs, kernel_init=init,
    )  # fmt: skip


class DepthwiseConv(nnx.Module):
    """Each channel by itself, `out` / `width` times: `kernels.depthwise_conv`, and a bias where
    there is one."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int,
        *,
        stride: int,
        use_bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal((2 * width / out) ** 0.5 / kernel)
        self.kernel = nnx.Param(init(rngs.params(), (kernel, kernel, 1, out)))
        self.bias = nnx.Param(jnp.zeros(out)) if use_bias else None
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """In the compute dtype."""
        x = x.astype(self.dtype)
        out = depthwise_conv(x, self.kernel[...].astype(self.dtype), stride=self.stride)
        return (
            out if self.bias is None else out + self.bias[...].astype(out.dtype)[None, None, None]
        )


class ConvNorm(nnx.Module):
    """activation(norm(conv(x))), see `conv2d` and `BatchNorm`; without a bias but with `use_bias`.

    With norm="none" activation(conv(x)), with a bias.
    """

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: Literal["batchnorm", "none"] = "batchnorm",
        use_bias: bool = False,
        activation: Activation = "none",
        epsilon: float = 1e-5,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.normed = norm == "batchnorm"
        self.conv = conv2d(
            width, out, kernel, stride=stride, groups=groups, use_bias=use_bias or not self.normed,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if self.normed:
            self.norm = BatchNorm(out, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.activation: Activation = activation

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        x = self.conv(x)
        return ACTIVATIONS[self.activation](self.norm(x, rngs=rngs) if self.normed else x)
