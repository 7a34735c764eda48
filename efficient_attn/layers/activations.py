"""Activations by name."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array

Activation = Literal[
    "none", "relu", "relu6", "silu", "gelu", "gelu_exact", "hardswish", "sigmoid", "hardsigmoid"
]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "hardswish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "hardsigmoid": jax.nn.hard_sigmoid,
}
"""gelu is that by tanh, gelu_exact that by erf; relu6 min(relu(x), 6); hardsigmoid
relu6(x + 3) / 6, hardswish x times that (MobileNetV3, arXiv 1905.02244, section 5.2)."""
