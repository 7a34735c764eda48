"""Swin, PVT v2 and PoolFormer on small tables of stages: what is special, and other attention."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.errors import UserError
from tests import support

FAMILIES = {
    "swin_tiny_patch4_window7_224": "window(window=2) + window(window=2, shift=1)",
    "pvt_v2_b0": "spatial_reduction(ratio=2)",
    "poolformer_s12": "pool",
}
"""Of each family one network, and what may stand in its table."""
SIDE = 32


def table(name):
    """Two stages, of 2 blocks of 16 channels and 1 of 32, as JSON has them."""
    stages = [
        {"depth": depth, "width": width, "heads": 2, "mixer": FAMILIES[name], "mlp_ratio": 2}
        for depth, width in ((2, 16), (1, 32))
    ]
    return json.loads(json.dumps({"stages": stages}))


def create(name, attention="native", side=SIDE, **options):
    return backbones.create(
        name, table(name) | options, attention=attention, image_size=side, num_classes=5
    )


def images(side=SIDE):
    return jnp.asarray(support.draw((2, side, side, 3), seed=0))


SWAPS = [
    ("swin_tiny_patch4_window7_224", "linear", "Linear"),
    ("pvt_v2_b0", "linformer(rank=4)", "Linformer"),
    ("poolformer_s12", "performer(features=8)", "Performer"),
]


@pytest.mark.parametrize(("name", "attention", "core"), SWAPS)
def test_another_attention_takes_the_place_of_the_native_one(name, attention, core):
    made = nnx.eval_shape(lambda: create(name, attention, drop_path=0.1))
    blocks = [block for stage in made.stages for block in stage.layers[-1].stack.blocks]
    assert [type(block.mixer.core).__name__ for block in blocks] == [core] * 3
    graph, state = nnx.split(made)
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: 0.1 * random.standard_normal(x.shape).astype(x.dtype), state)
    call = jax.jit(
        lambda state, rngs: nnx.merge(graph, state)(images(), rngs=rngs),
        compiler_options=support.fast(),
    )
    logits = call(state, nnx.Rngs(0))
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all() and np.ptp(logits, axis=0).min() > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_gives_its_map(name):
    made = nnx.eval_shape(lambda: create(name, "linear", side=36))
    graph, state = nnx.split(made)
    maps = jax.eval_shape(lambda s: nnx.merge(graph, s).features(images(36)), state)
    assert [x.shape for x in maps] == [(2, 9, 9, 16), (2, 5, 5, 32)]


def test_images_that_windows_do_not_tile_are_refused():
    told = (
        "windows of 7 do not tile the map of 64 x 64 that images of 256 x 256 make; choose sides "
        "that are multiples of 224, or another attention than 'native'"
    )
    with pytest.raises(UserError, match=told):
        nnx.eval_shape(lambda: backbones.create("swin_tiny_patch4_window7_224", image_size=256))
    nnx.eval_shape(lambda: create("swin_tiny_patch4_window7_224", "window", side=36))


def test_images_too_small_for_a_stem_are_refused():
    with pytest.raises(UserError, match=r"images of \(2, 2\) are too small"):
        nnx.eval_shape(lambda: create("poolformer_s12", side=2))


def test_a_table_without_stages_is_refused():
    with pytest.raises(UserError, match="stages=.* leaves nothing to build"):
        create("pvt_v2_b0", stages=[])
