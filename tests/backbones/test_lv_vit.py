"""LV-ViT against its blocks written out in float64, and the counts that were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.layers.norm import BatchNorm
from efficient_attn.tools.profile import profile
from efficient_attn.tools.published import agrees
from tests.backbones.test_sparse import Formulas, counted, dynamic, images, logits, make
from tests.support import fast, relative

PRINTED = {
    ("lvvit_t", 224): ("8.53", None),
    ("lvvit_s", 224): ("26.15", "6.6"),
    ("lvvit_s", 384): ("26.30", None),
    ("lvvit_m", 224): ("55.83", "12.7"),
    ("lvvit_m", 384): ("56.03", None),
    ("lvvit_m", 448): ("56.13", None),
    ("lvvit_l", 448): ("150.47", None),
    ("lvvit_l", 512): ("150.66", None),
    ("dynamicvit_lvvit_m", 224): ("57.1", None),
}
"""Millions of parameters in zihangJiang/TokenLabeling's README; those of DynamicViT, and billions
of multiply-adds, in arXiv 2106.02034, table 2."""


@pytest.mark.parametrize(
    ("name", "side"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] != "lvvit_t")) for case in PRINTED],
)
def test_counts_are_those_printed(name, side):
    total = profile(name, image_size=side).total
    millions, billions = PRINTED[name, side]
    assert agrees(total.parameters / 1e6, millions)
    assert billions is None or agrees(total.multiply_adds / 1e9, billions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "rate", "published"), [("s", 0.7, 4.6), ("s", 0.5, 3.7), ("m", 0.7, 8.5)]
)
def test_dynamicvits_multiply_adds_are_cut_off_as_its_others_are(size, rate, published):
    assert int(counted(f"dynamicvit_lvvit_{size}", keep_rate=rate) / 1e8) / 10 == published


def conv(x, kernel, stride):
    """[H, W, C] with K // 2 zeros around it -> [h, w, F]."""
    side = len(kernel)
    x = np.pad(x, [(side // 2,) * 2, (side // 2,) * 2, (0, 0)])
    h, w = ((n - side) // stride + 1 for n in x.shape[:2])
    out = np.zeros((h, w, kernel.shape[-1]))
    for i, j in np.ndindex(h, w):
        window = x[stride * i : stride * i + side, stride * j : stride * j + side]
        out[i, j] = np.einsum("ijc,ijcf->f", window, kernel)
    return out


class LvFormulas(Formulas):
    """As `Formulas`, where LV-ViT is another network."""

    def __init__(self, model):
        super().__init__(model)
        as_floats = lambda x: np.asarray(x, np.float64)  # noqa: E731
        statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        self.statistics = jax.tree.map(as_floats, statistics)["stem"]["layers"]

    def linear(self, x, w):
        return x @ w["kernel"] + w.get("bias", 0.0)

    def norm(self, x, w, epsilon=1e-5):
        return super().norm(x, w, epsilon)

    def tokens(self, image):
        x = np.asarray(image, np.float64)
        for i in range(3):
            layer, seen = self.w["stem"]["layers"][i], self.statistics[i]["norm"]["norm"]
            x = conv(x, layer["conv"]["kernel"], 1 if i else 2) - seen["mean"]
            scale = layer["norm"]["norm"]
            x = np.maximum(x / np.sqrt(seen["var"] + 1e-5) * scale["scale"] + scale["bias"], 0)
        x = x.reshape(4, 4, 4, 4, -1).swapaxes(1, 2).reshape(16, -1)  # patches of 4 x 4 channels
        x = self.linear(x, self.w["embed"])
        return np.concatenate([self.w["cls"][0], x]) + self.w["positions"]

    def classify(self, x):
        x = self.norm(x, self.w["stack"]["norm"])
        patches = self.linear(x[1:], self.w["dense"])
        return self.linear(x[0], self.w["classifier"]["linear"]) + patches.max(axis=0) / 2


def filled(name, **options):
    """The network with statistics that say something."""
    model = make(name, stem=6, branch_scale=1 / 3, **options)
    random = np.random.default_rng(2)

    def fill(x):
        return jnp.asarray(0.5 + random.random(x.shape), x.dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.BatchStat)))
    return model


def test_the_network_is_its_paper_and_dynamicvit_over_it():
    model = filled("dynamicvit_lvvit_s", keep_rate=0.6)
    expected = [dynamic(LvFormulas(model), image) for image in images()]
    assert relative(logits(model, images()), np.stack(expected)) < 1e-5


def test_a_plain_one_trains_its_stem_and_tells_its_patches_apart():
    options = {"width": 16, "heads": 2, "depth": 1, "patch": 8, "stem": 4}
    model = backbones.create("lvvit_s", options, image_size=32, num_classes=5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def call(state, x):
        merged = nnx.merge(graph, state)
        whole, patches = merged.token_logits(x, rngs=nnx.Rngs(0))
        return whole, patches, nnx.state(merged, nnx.BatchStat)

    whole, patches, after = jax.jit(call, compiler_options=fast())(state, images())
    assert whole.shape == (3, 5) and patches.shape == (3, 16, 5)
    assert sum(isinstance(module, BatchNorm) for _, module in nnx.iter_modules(model)) == 3
    for before, now in zip(
        jax.tree.leaves(nnx.state(model, nnx.BatchStat)), jax.tree.leaves(after), strict=True
    ):
        assert np.abs(np.asarray(before) - np.asarray(now)).max() > 1e-5
