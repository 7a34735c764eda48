"""Costs of layers: multiply-adds by their formulas, memory that holds what it must."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention import Site
from efficient_attn.errors import UserError
from efficient_attn.tools.measures.baselines import BASELINES
from efficient_attn.tools.measures.cost import Layers, Layout, exact, functions, measure
from kernels import Mask, reference

SMALL = {"part": "block", "length": 64, "width": 16, "heads": 2, "depth": 1, "mlp_ratio": 4.0}
SMALL |= {"batch": 1}


def test_baselines_are_softmax_and_the_values():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    site = Site(width=8, heads=2, seq=5)
    found = {
        name: core(core.Config(), site, rngs=nnx.Rngs(0), shared={})(
            q, k, v, mask=Mask(), shared={}
        )
        for name, core in BASELINES.items()
    }
    np.testing.assert_allclose(
        found["materialised"], reference.softmax_attention(q, k, v), atol=1e-6
    )
    np.testing.assert_array_equal(found["identity"], v)


@pytest.mark.parametrize("part", ["block", "attention"])
def test_multiply_adds_are_those_of_the_formulas(part):
    layout = Layout(**(SMALL | {"part": part, "depth": 2, "batch": 3}))
    length, width = 64, 16
    projections = 4 * length * width**2 + (part == "block") * 8 * length * width**2
    adds = {name: exact(name, layout, "forward").multiply_adds for name in BASELINES}
    assert adds["identity"] == 2 * projections
    assert adds["materialised"] == 2 * (projections + 2 * length**2 * width)


def test_all_weights_are_held_and_only_by_the_baseline():
    layout = Layout(**(SMALL | {"length": 512}))
    weights = 4 * 2 * 512**2
    held = {
        name: exact(name, layout, "training").held_bytes for name in ("materialised", "identity")
    }
    assert held["materialised"] - held["identity"] > weights > held["identity"]


def test_measure_compares_and_times_up_to_a_length():
    given = {"seed": 0, "against": "materialised", "mode": "forward", "turns": 1, **SMALL}
    found = measure(expression="identity", timed=64, **given)
    assert found["adds_saved"] == pytest.approx((12 * 16 + 2 * 64) / (12 * 16))
    assert found["speed_up"] > 0 and found["step_seconds"] > 0
    again = measure(expression="materialised", timed=63, **given)
    assert again["memory_saved"] == again["adds_saved"] == 1
    assert "step_seconds" not in again


def test_layers_share_what_their_mechanism_shares():
    layout = Layout(**(SMALL | {"depth": 2}))
    expression = "linformer(rank=8, sharing='layerwise')"
    layers = nnx.eval_shape(lambda: Layers(expression, layout, rngs=nnx.Rngs(0)))
    assert len(layers.layers) == 2 and len(layers.shared) == 1
    made, arguments = functions(expression, layout)
    given = jax.eval_shape(lambda: arguments(0))
    assert jax.eval_shape(made["forward"], *given).shape == (1, 64, 16)
    with pytest.raises(UserError, match="lnear"):
        Layers("lnear", layout, rngs=nnx.Rngs(0))
