"""Mobile-Former: its blocks as equations, and the counts that were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.blocks.mobile_former import (
    NATIVE,
    MobileFormerBlock,
    Row,
    Situation,
    shuffle,
)
from tests import support

PARAMETERS = {
    "mobile_former_26m": 3_232_788, "mobile_former_52m": 3_469_092,
    "mobile_former_96m": 4_585_252, "mobile_former_151m": 7_595_828,
    "mobile_former_214m": 9_425_920, "mobile_former_294m": 11_422_648,
    "mobile_former_508m": 13_976_976,
}  # fmt: skip
"""Those of the networks of AAboys/MobileFormer, built; its README prints them in millions: 3.2,
3.5, 4.6, 7.6, 9.4, 11.4, 14.0."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name[14:] not in ("26m", "151m")))
        for name in PARAMETERS
    ],
)
def test_parameters_are_those_of_the_released_networks(name):
    model = nnx.eval_shape(lambda: backbones.create(name))
    held = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert held == PARAMETERS[name]


def test_shuffled_channels_are_dealt_in_turn():
    x = jnp.arange(6.0).reshape(1, 1, 1, 6)
    assert shuffle(x, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def linear(w, x):
    return x @ w["kernel"] + w["bias"]


def normed(w, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w["scale"] + w["bias"]


def attend(q, k, v, heads):
    parts = []
    for h in range(heads):
        at = [slice(h * (x.shape[-1] // heads), (h + 1) * (x.shape[-1] // heads)) for x in (q, v)]
        logits = q[..., at[0]] @ k[..., at[0]].swapaxes(-1, -2) / np.sqrt(q.shape[-1] // heads)
        parts.append(softmax(logits) @ v[..., at[1]])
    return np.concatenate(parts, axis=-1)


def gate(x):
    return np.clip(x + 3, 0, 6) / 6


def pointwise(w, x):
    """1 x 1 and the norm, whose statistics are still 0 and 1."""
    return x @ w["conv"]["kernel"][0, 0] / np.sqrt(1 + 1e-5)


def depthwise(w, x):
    kernel, out = w["conv"]["kernel"], np.zeros_like(x)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in np.ndindex(3, 3):
        out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] * kernel[i, j, 0]
    return out / np.sqrt(1 + 1e-5)


def bent(w, x, token):
    slopes = gate(linear(w["excite"], np.maximum(linear(w["squeeze"], token), 0)))
    a, b = np.split(slopes[:, None, None], 2, axis=-1)
    return np.maximum(x * ((a - 0.5) * 2 + 1), x * (b - 0.5) * 2)


def test_a_block_is_its_equations():
    where = Situation(tokens=3, token_width=16, groups=1, dtype=jnp.float32, backend="auto")
    module = MobileFormerBlock(
        8, Row("mobile", 8, 3), where, NATIVE, layer=0, rngs=nnx.Rngs(0), shared={}
    )
    random = np.random.default_rng(0)
    for _, value in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if value[...].ndim == 2:  # the released 0.01 would leave every attention uniform
            value[...] = jnp.asarray(0.4 * random.standard_normal(value.shape), jnp.float32)
    x, z = random.standard_normal((2, 4, 4, 8)), random.standard_normal((2, 3, 16))
    call = jax.jit(lambda x, z: module(x, z, rngs=None, shared={}), compiler_options=support.fast())
    got = call(jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32))

    w = support.weights(module)
    places = x.reshape(2, 16, 8)
    seen = attend(linear(w["to_tokens"]["query"], z), places, places, 2)
    seen = seen * 2 * gate(linear(w["to_tokens"]["gate"], z))
    z = normed(w["to_tokens"]["norm"], z + linear(w["to_tokens"]["out"], seen))
    former = w["former"]
    seen = linear(former["mixer"]["out"], attend(linear(former["mixer"]["query"], z), z, z, 4))
    z = normed(former["mixer_norm"], z + seen)
    hidden = linear(former["mlp"]["expand"], z)
    hidden = np.asarray(jax.nn.gelu(hidden, approximate=False), np.float64)
    z = normed(former["mlp_norm"], z + linear(former["mlp"]["contract"], hidden))
    y = bent(w["relus"][0], pointwise(w["conv1"], x), z[:, 0])
    y = bent(w["relus"][1], depthwise(w["conv2"], y), z[:, 0])
    y = x + pointwise(w["conv3"], y)
    keys, values = (linear(w["to_map"][name], z) for name in ("key", "value"))
    y = y + attend(y.reshape(2, 16, 8), keys, values, 2).reshape(y.shape)
    assert support.relative(got[0], y) < 1e-5
    assert support.relative(got[1], z) < 1e-5
