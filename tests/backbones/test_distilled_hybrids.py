"""LeViT, EfficientFormer, T2T-ViT, Mobile-Former: maps, classifiers, another attention inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.attention.biased import Biased
from efficient_attn.attention.multihead import MultiHead
from efficient_attn.blocks.mobile_former import Former
from efficient_attn.errors import UserError
from tests import support

SMALL = {
    "levit_128s": {"stages": [{"width": 32, "heads": 3, "depth": 1}] * 2},
    "efficientformer_l1": {"stages": [{"width": 16, "pools": 1}, {"width": 24, "pools": 1}]},
    "t2t_vit_7": {"depth": 2},
    "mobile_former_26m": {
        "blocks": [
            {"kind": "lite", "width": 12, "expand": 3, "stride": 2},
            {"kind": "mobile", "width": 12, "expand": 3},
            {"kind": "down", "width": 16, "expand": 6},
        ]
    },
}
SMALL["efficientformer_l1"]["stages"][1]["attentions"] = 2
IMAGE = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)


def create(name, **options):
    return backbones.create(name, SMALL[name], num_classes=5, image_size=64, **options)


def shapes(model, method="__call__"):
    graph, state = nnx.split(model)
    return jax.eval_shape(lambda s, x: getattr(nnx.merge(graph, s), method)(x), state, IMAGE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("levit_128s", [(4, 4, 32), (2, 2, 32)]),
        ("efficientformer_l1", [(16, 16, 16), (8, 8, 24)]),
        ("t2t_vit_7", [(4, 4, 256)]),
        ("mobile_former_26m", [(16, 16, 12), (8, 8, 16)]),
    ],
)
def test_maps_are_those_of_each_resolution(name, expected):
    maps = shapes(nnx.eval_shape(lambda: create(name)), "features")
    assert [x.shape[1:] for x in maps] == expected


@pytest.mark.parametrize("name", SMALL)
def test_an_expression_takes_the_place_of_the_attention(name):
    native = nnx.eval_shape(lambda: create(name))
    model = nnx.eval_shape(lambda: create(name, attention="performer(features=8)"))
    kinds = [type(m) for _, m in nnx.iter_modules(model)]
    assert MultiHead in kinds and not {Biased, Former} & set(kinds)
    if name != "t2t_vit_7":
        assert {Biased, Former} & {type(m) for _, m in nnx.iter_modules(native)}
    assert shapes(model).shape == (2, 5)


@pytest.mark.parametrize("name", ["levit_128s", "efficientformer_l1"])
def test_logits_are_the_mean_of_both_classifiers(name):
    """In training, statistics of the batch move the running ones."""
    model = create(name)
    graph, state = nnx.split(model)

    def both(state, x):
        model = nnx.merge(graph, state)
        before = model(x), *model.heads(x)
        model(x, rngs=nnx.Rngs(0))
        return before, model.heads(x)

    x = jnp.asarray(np.random.default_rng(0).standard_normal(IMAGE.shape), jnp.float32)
    (mean, first, second), after = jax.jit(both, compiler_options=support.fast())(state, x)
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6, atol=1e-6)
    assert np.abs(first - second).max() > 1e-2
    assert np.abs(first - after[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("levit_128s", {"stages": [{"width": 40, "heads": 2, "depth": 1}]}, "multiple of 32"),
        ("efficientformer_l1", {"stages": [{"width": 20, "pools": 1}]}, "its 8 heads"),
        ("mobile_former_26m", {"token_width": 2}, "token_width must be at least 4, not 2"),
        ("t2t_vit_7", {"tokens": "linear"}, "must be one of 'performer', 'transformer'"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, message):
    with pytest.raises(UserError, match=message):
        backbones.create(name, options)
