"""Published image models: timm's parameters and timm's logits, from timm's weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from efficient_attn import backbones
from tests import support
from tests.backbones.golden import FILE, images, synthetic

GOLDEN = json.loads(FILE.read_text())
LARGE = 40_000_000
LOGITS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "pvt_v2_b2_li"))  # the second of PVT v2
    for name, line in GOLDEN.items()
    if "logits" in line
]


def parameters(model) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def slow(name: str, size: int) -> bool:
    """Large, or one of twelve RegNets that differ in a table of numbers alone."""
    return size > LARGE or (name.startswith("regnety") and name != "regnety_002")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * slow(name, line["parameters"]))
        for name, line in GOLDEN.items()
    ],
)
def test_parameters_are_timms(name):
    model = nnx.eval_shape(lambda: backbones.create(name))
    assert parameters(model) == GOLDEN[name]["parameters"]


def blank(name, side):
    """The model with zeros for numbers: drawing them takes most of the time."""
    model = nnx.eval_shape(lambda: backbones.create(name, image_size=side))
    nnx.update(model, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.state(model)))
    return model


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_timms(name, tmp_path):
    """Saved under timm's names, filled with the numbers that timm's own had, and read back."""
    line = GOLDEN[name]
    model = blank(name, line["image_size"])
    backbones.save(model, tmp_path / "blank.safetensors", names="timm")
    empty = load_file(tmp_path / "blank.safetensors")
    filled = {key: synthetic(key, x.shape) for key, x in empty.items()}
    save_file(filled, tmp_path / "filled.safetensors")
    report = backbones.load(model, tmp_path / "filled.safetensors")
    assert not report.missing and not report.unused
    call = jax.jit(lambda x: model(x), compiler_options=support.fast())
    got = np.asarray(call(jnp.asarray(images(line["image_size"]))))[:, :8]
    expected = np.asarray(line["logits"])
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)
