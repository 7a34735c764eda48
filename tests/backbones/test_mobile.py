"""Convolutional networks and their hybrids: maps, swapped attention, training, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention, backbones
from efficient_attn.blocks.inverted_residual import Skip, in_eights
from efficient_attn.blocks.squeeze_excite import SqueezeExcite
from efficient_attn.errors import UserError
from tests import support

FEATURES = {  # as timm.create_model(name, features_only=True) gives them, but for a ResNet's stem
    "resnet50": {4: 256, 8: 512, 16: 1024, 32: 2048},
    "mobilenetv2_050": {2: 8, 4: 16, 8: 16, 16: 48, 32: 160},
    "mobilenetv3_large_100": {2: 16, 4: 24, 8: 40, 16: 112, 32: 960},
    "mobilevit_xxs": {2: 16, 4: 24, 8: 48, 16: 64, 32: 320},
    "mobilevitv2_050": {2: 32, 4: 64, 8: 128, 16: 192, 32: 256},
    "efficientvit_b0": {4: 16, 8: 32, 16: 64, 32: 128},
    "efficientvit_l1": {4: 64, 8: 128, 16: 256, 32: 512},
}
TINY = {
    "mobilevit_xxs": {
        "stem": 8, "last": 16,
        "stages": [
            {"width": 8, "stride": 2},
            {"width": 16, "stride": 2, "inner": 32, "layers": 2},
        ],
    },
    "efficientvit_b0": {
        "stem": 8, "head": [16, 24], "head_dim": 8,
        "stages": [
            {"width": 8, "depth": 0},
            {"width": 32, "depth": 2, "kind": "attention", "norm": "none"},
        ],
    },
}  # fmt: skip
TINY["mobilevitv2_050"] = {
    "stem": 8,
    "stages": [{"width": 8}, {"width": 16, "inner": 32, "layers": 2, "mixer": "separable"}],
}
SIDE = 32


def shapes(name, options=None, **given):
    return nnx.eval_shape(lambda: backbones.create(name, options, **given))


def tiny(name, instead):
    """A network of the family with two stages, every number drawn."""
    model = shapes(name, TINY[name], attention=instead, image_size=SIDE, num_classes=5)
    random = np.random.default_rng(0)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        drawn = random.standard_normal(leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(
            0.5 + np.abs(drawn) if "'var'" in jax.tree_util.keystr(path) else drawn, leaf.dtype
        )

    nnx.update(model, jax.tree_util.tree_map_with_path(fill, nnx.state(model)))
    return model


def pictures(batch=2):
    drawn = np.random.default_rng(1).standard_normal((batch, SIDE, SIDE, 3))
    return jnp.asarray(drawn, jnp.float32)


QUICK = ("resnet50", "mobilenetv2_050", "mobilevit_xxs")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FEATURES]
)
def test_there_is_a_map_of_each_resolution(name):
    graph, state = nnx.split(shapes(name))
    side = backbones.VARIANTS[name].image_size
    picture = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    maps = jax.eval_shape(lambda s, x: nnx.merge(graph, s).features(x), state, picture)
    assert {side // x.shape[1]: x.shape[-1] for x in maps} == FEATURES[name]
    assert len(maps) == len(FEATURES[name])


BOTH = "linformer(rank=4, sharing='layerwise') + relu_linear(scales=(3,))"
SWAPS = [
    ("mobilevit_xxs", "performer(features=8)"),
    ("efficientvit_b0", "softmax"),
    pytest.param("mobilevitv2_050", "softmax", marks=pytest.mark.slow),
    pytest.param("mobilevit_xxs", BOTH, marks=pytest.mark.slow),
    pytest.param("efficientvit_b0", BOTH, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "instead"), SWAPS)
def test_another_attention_takes_the_place(name, instead):
    """It is there, it runs, and all of it learns."""
    model = tiny(name, instead)
    asked = {choice.mechanism for choice in attention.pattern(instead, 2)}
    found = {type(module) for _, module in nnx.iter_modules(model)}
    assert found & set(attention.MIXERS.values()) == asked
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        logits = nnx.merge(graph, params, rest)(x)
        return jnp.sum(logits**2), logits

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=support.fast())
    slopes, logits = run(params, pictures())
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    for path, slope in nnx.to_flat_state(slopes):
        slope = np.asarray(slope.get_value())
        # a bias of all keys moves every logit of a softmax alike
        dead = path[-2:] == ("key", "bias")
        assert np.isfinite(slope).all() and (dead or np.abs(slope).max() > 0), path


def test_training_moves_the_running_statistics_and_leaves_branches_out():
    options = TINY["efficientvit_b0"] | {"drop_path": 0.5, "dropout": 0.1}
    model = backbones.create("efficientvit_b0", options, image_size=SIDE, num_classes=5)
    graph, state = nnx.split(model)

    def step(state, x, key):
        model = nnx.merge(graph, state)
        return model(x, rngs=nnx.Rngs(key)), nnx.state(model)

    step = jax.jit(step, compiler_options=support.fast())
    one, after = step(state, pictures(), jax.random.key(0))
    other, _ = step(state, pictures(), jax.random.key(1))
    assert np.abs(one - other).max() > 1e-4
    moved = [
        not np.array_equal(x, y)
        for x, y in zip(
            jax.tree.leaves(nnx.state(model, nnx.BatchStat)),
            jax.tree.leaves(nnx.filter_state(after, nnx.BatchStat)),
            strict=True,
        )
    ]
    assert moved and all(moved)


def test_squeeze_and_excitation_is_that_of_the_formula():
    block = SqueezeExcite(8, 4, gate="hardsigmoid", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)
    one, two = (np.asarray(conv.kernel[...])[0, 0] for conv in (block.squeeze, block.excite))
    factor = np.clip(np.maximum(x.mean((1, 2)) @ one, 0) @ two / 6 + 0.5, 0, 1)
    np.testing.assert_allclose(block(jnp.asarray(x)), x * factor[:, None, None], atol=1e-6)


def test_a_skipped_branch_is_skipped_for_the_whole_example():
    x, y = jnp.zeros((64, 2, 2, 3)), jnp.ones((64, 2, 2, 3))
    out = np.asarray(Skip(True, 0.5)(x, y, rngs=nnx.Rngs(0)))
    assert set(np.unique(out)) == {0.0, 2.0}
    assert (out == out[:, :1, :1, :1]).all()
    np.testing.assert_array_equal(Skip(True, 0.5)(x, y, rngs=None), 1)
    np.testing.assert_array_equal(Skip(False, 0.5)(y, x, rngs=None), 0)


def test_widths_are_rounded_to_eights_but_not_by_more_than_a_tenth():
    assert [in_eights(x) for x in (3, 11.2, 12, 16.8, 33.6, 44.8)] == [8, 16, 16, 16, 32, 48]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="2 do not tile a map of 7 x 7.* multiples of 64"):
        shapes("mobilevit_xxs", image_size=224)
    for name in ("resnet50", "mobilenetv2_050"):
        with pytest.raises(UserError, match="no attention for 'performer' to replace; leave"):
            shapes(name, attention="performer")
    with pytest.raises(UserError, match="inner=0 and layers=2: a transformer has both"):
        shapes("mobilevit_xxs", {"stages": [{"width": 8, "layers": 2}]})
    with pytest.raises(UserError, match="head_dim=16 does not divide a stage's width=24"):
        shapes("efficientvit_b0", {"stages": [{"width": 24, "depth": 1, "kind": "attention"}]})
    with pytest.raises(UserError, match=r"scales=\(4,\) must be odd"):
        shapes("efficientvit_b0", attention="relu_linear(scales=(4,))")
    with pytest.raises(UserError, match="mixes the rows and columns of a picture"):
        backbones.create("deit_tiny_patch16_224", attention="relu_linear")
