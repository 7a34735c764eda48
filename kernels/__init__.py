"""Attention as functions of arrays: exact, memory-lean, with nothing but jax beneath them.

Layout `B T H D` (batch, length, heads, head dim); S is the length of the keys, R the number of
features, G the number of key-value heads, K the number of taps of a convolution.
"""

from kernels.linear_attention import (
    LinearState,
    linear_attention,
    linear_attention_init,
    linear_attention_step,
)
from kernels.local_conv import local_conv
from kernels.mask import Mask
from kernels.softmax_attention import softmax_attention

__all__ = [
    "LinearState",
    "Mask",
    "linear_attention",
    "linear_attention_init",
    "linear_attention_step",
    "local_conv",
    "softmax_attention",
]
