"""The feed-forward layer of PVT v2 against its formula."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.blocks import GridShape
from efficient_attn.errors import UserError
from efficient_attn.layers.conv_mlp import ConvMlp

ROWS, COLUMNS = 3, 4


@pytest.mark.parametrize("before", ["none", "relu"])
def test_it_is_its_formula(before):
    made = ConvMlp(
        5, 7, grid=(ROWS, COLUMNS), before=before, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    random = np.random.default_rng(0)
    x = random.standard_normal((2, ROWS * COLUMNS, 5))
    for layer in (made.expand, made.conv, made.contract):
        layer.bias[...] = jnp.asarray(random.standard_normal(layer.bias.shape), jnp.float32)
    w = {name: np.asarray(getattr(made, name).kernel[...], np.float64) for name in
         ("expand", "conv", "contract")}  # fmt: skip
    b = {name: np.asarray(getattr(made, name).bias[...], np.float64) for name in w}

    y = x @ w["expand"] + b["expand"]
    y = np.maximum(y, 0) if before == "relu" else y
    wide = np.pad(y.reshape(2, ROWS, COLUMNS, 7), [(0, 0), (1, 1), (1, 1), (0, 0)])
    z = np.zeros((2, ROWS, COLUMNS, 7))
    for r, c in np.ndindex(ROWS, COLUMNS):
        z[:, r, c] = np.sum(wide[:, r : r + 3, c : c + 3] * w["conv"][None, :, :, 0], axis=(1, 2))
    z = (z + b["conv"]).reshape(2, ROWS * COLUMNS, 7)
    z = z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    expected = z @ w["contract"] + b["contract"]
    np.testing.assert_allclose(made(jnp.asarray(x, jnp.float32), rngs=None), expected, atol=1e-5)


def test_it_has_no_gate():
    with pytest.raises(UserError, match="mlp_conv='depthwise' goes with an mlp without a gate"):
        GridShape(mlp_conv="depthwise", mlp="swiglu")
