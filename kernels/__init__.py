"""Attention as functions of arrays: exact, memory-lean, with nothing but jax beneath them.

Layout `B T H D` (batch, length, heads, head dim); S is the length of the keys, R the number of
features, G the number of key-value heads, K the number of taps of a convolution.
"""

from kernels.block_attention import Blocks, Part, block_attention, join
from kernels.decode_step import decode_step
from kernels.depthwise_conv import depthwise_conv
from kernels.divide import divide
from kernels.favor_attention import causal_favor_attention, favor_attention, favor_features
from kernels.gated_delta_rule import gated_delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.linear_attention import (
    LinearState,
    causal_linear_attention,
    linear_attention,
    linear_attention_init,
    linear_attention_read,
    linear_attention_step,
    linear_attention_sum,
)
from kernels.linformer_attention import linformer_attention
from kernels.local_conv import last_inputs, local_conv, local_conv_step
from kernels.lsh_attention import lsh_attention
from kernels.mask import Mask
from kernels.softmax_attention import softmax_attention
from kernels.window_attention import window_attention

__all__ = [
    "Blocks",
    "LinearState",
    "Mask",
    "Part",
    "block_attention",
    "causal_favor_attention",
    "causal_linear_attention",
    "decode_step",
    "depthwise_conv",
    "divide",
    "favor_attention",
    "favor_features",
    "gated_delta_rule",
    "gated_linear_attention",
    "join",
    "last_inputs",
    "linear_attention",
    "linear_attention_init",
    "linear_attention_read",
    "linear_attention_step",
    "linear_attention_sum",
    "linformer_attention",
    "local_conv",
    "local_conv_step",
    "lsh_attention",
    "softmax_attention",
    "window_attention",
]
