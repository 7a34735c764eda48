"""Error through depth: none for softmax itself, and that of one block by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_attn.tools.measures.cost import Layers, Layout
from efficient_attn.tools.measures.favor_depth import measure

SMALL = {"samples": 1, "length": 16, "width": 8, "heads": 2, "mlp_ratio": 2.0}


def test_softmax_in_its_own_place_is_exact_and_features_are_not():
    assert measure(seed=0, expression="softmax", depth=2, **SMALL)["output_error"] == 0
    found = measure(seed=0, expression="performer(features=4)", depth=1, **SMALL)
    assert found["output_error"] > 1e-6


@pytest.mark.slow
def test_one_block_is_that_of_the_module_with_softmax_weights():
    found = measure(seed=3, expression="performer(features=4)", depth=1, **SMALL)
    (key,) = jax.random.split(jax.random.key(3), 1)
    start, layers = jax.random.split(key)
    (layer,) = jax.random.split(layers, 1)
    x = jax.random.normal(start, (1, 16, 8))
    layout = Layout("block", 16, 8, 2, 1, 2.0, 1)
    exact = Layers("softmax", layout, rngs=nnx.Rngs(layer))
    estimate = Layers("performer(features=4)", layout, rngs=nnx.Rngs(layer))
    nnx.update(estimate, nnx.state(exact, nnx.Param))
    error = jnp.mean(jnp.square(exact(x) - estimate(x)))
    assert found["output_error"] == pytest.approx(float(error), rel=1e-4)
    relative = error / jnp.mean(jnp.square(exact(x)))
    assert found["relative_error"] == pytest.approx(float(relative), rel=1e-4)
