"""Weights from and to files: ours come back, timm's names hold, and what does not fit is said."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from efficient_attn import backbones
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs

SMALL = {"depth": 2, "width": 16, "heads": 2}


def create(seed=0, **options):
    attention = options.pop("attention", "native")
    return backbones.create(
        "deit_tiny_distilled_patch16_224", SMALL | options, attention=attention, num_classes=3,
        image_size=32, rngs=make_rngs(seed),
    )  # fmt: skip


def arrays(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize("names", ["ours", "timm"])
def test_what_is_saved_comes_back(names, tmp_path):
    model, other = create(seed=1), create(seed=2)
    backbones.save(model, tmp_path / "w.safetensors", names=names)
    report = backbones.load(other, tmp_path / "w.safetensors")
    assert not report.missing and not report.unused
    for got, expected in zip(arrays(other), arrays(model), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_timms_layout(tmp_path):
    """Linear layers out x in, queries, keys and values in one, patches as a convolution."""
    model = create()
    backbones.save(model, tmp_path / "w.safetensors", names="timm")
    theirs = load_file(tmp_path / "w.safetensors")
    block = model.stack.blocks[1]
    assert theirs["blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert theirs["pos_embed"].shape == (1, 6, 16)
    np.testing.assert_array_equal(
        theirs["blocks.1.attn.qkv.weight"][16:32], block.mixer.key.kernel[...].T
    )
    kernel = np.asarray(model.embed.kernel[...]).reshape(16, 16, 3, 16)
    np.testing.assert_array_equal(theirs["patch_embed.proj.weight"][5, 2, 3, 4], kernel[3, 4, 2, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, r"is of another network: .* is \(.*16.*\) there and \(.*32.*\) here"),
        ({"depth": 3}, r"16 not in the file: stack.blocks.2.*partial=True takes what does"),
        ({"depth": 1}, r"12 not used: blocks.1"),
    ],
    ids=str,
)
def test_weights_of_another_variant_are_refused(change, message, tmp_path):
    backbones.save(create(), tmp_path / "w.safetensors", names="timm")
    other = create(seed=3, **change)
    before = arrays(other)
    with pytest.raises(UserError, match=message):
        backbones.load(other, tmp_path / "w.safetensors")
    for got, expected in zip(arrays(other), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    report = backbones.load(other, tmp_path / "w.safetensors", partial=True)
    assert report.matched and (report.missing or report.unused)


def test_a_model_with_another_attention_takes_the_rest(tmp_path):
    backbones.save(create(), tmp_path / "w.safetensors", names="timm")
    model = create(attention="synthesizer(mixture=('random',))", seed=4)
    report = backbones.load(model, tmp_path / "w.safetensors", partial=True)
    assert any("mixer" in name for name in report.missing)
    with pytest.raises(UserError, match="timm has no name for stack.blocks.0.mixer.*names='ours'"):
        backbones.save(model, tmp_path / "no.safetensors", names="timm")


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no file .*gone.safetensors"):
        backbones.load(create(), tmp_path / "gone.safetensors")
    save_file({"x": np.ones(3)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UserError, match="cut.safetensors is damaged, or no safetensors file"):
        backbones.load(create(), tmp_path / "cut.safetensors")


def test_names_by_pattern():
    assert "deit_tiny_patch16_224" in backbones.names("deit*224")
    assert backbones.names("no such") == []
    with pytest.raises(UserError, match="unknown model 'deit_tiny_patch16'; did you mean 'deit_"):
        backbones.create("deit_tiny_patch16")
    with pytest.raises(UserError, match="say what 'vit' reads"):
        backbones.create("vit")
