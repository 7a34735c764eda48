"""Every config and setting builds its model, and Long Range Arena's have the published numbers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.data.pathfinder import PRESETS
from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from efficient_attn.train import settings

FOLDER = Path(__file__).resolve().parents[2] / "configs"
TASKS = ("copy", "duplication", "mqar", "induction", "selective_copying")

ARENA = {
    # depth, width, heads, hidden, learning rate, steps, warm-up, batch, length
    ("listops", "paper"): (6, 512, 8, 2048, 0.05, 5000, 1000, 32, 1999),
    ("listops", "released"): (4, 512, 8, 1024, 0.05, 5000, 1000, 32, 1999),
    ("imdb", "paper"): (6, 512, 8, 2048, 0.05, 20_000, 8000, 32, 4000),
    ("imdb", "released"): (4, 256, 4, 1024, 0.05, 20_000, 8000, 32, 1000),
    ("retrieval", "x/y,paper"): (4, 128, 4, 512, 0.5, 5000, 8000, 32, 4000),
    ("retrieval", "x/y,released"): (4, 128, 4, 512, 0.05, 5000, 8000, 32, 4000),
    ("image", "cifar10,paper"): (3, 64, 4, 128, 0.01, 35_000, 175, 256, 1024),
    ("image", "cifar10,released"): (1, 128, 8, 128, 5e-4, 35_000, 175, 256, 1024),
    ("pathfinder", "32,paper"): (4, 128, 8, 128, 0.01, 62_400, 312, 512, 1024),
    ("pathfinder", "32,released"): (4, 32, 4, 32, 1e-3, 62_400, 312, 512, 1024),
    ("pathfinder", "128,paper"): (4, 128, 8, 128, 0.01, 500_000, 2500, 64, 16_384),
    ("pathfinder", "128,released"): (1, 32, 2, 32, 1e-3, 500_000, 2500, 64, 16_384),
}
REST = [
    ("listops", "short"),
    ("imdb", ""),
    ("imdb", "some/folder"),
    ("retrieval", "some/folder"),
    ("image", "mnist"),
    ("image", "some/folder,pixels"),
    ("image", "cifar10,mobilenetv2_050"),
    ("imagenet", "deit_tiny_patch16_224"),
    *(("pathfinder", f"{size},small") for size in ("32", "128")),
    *(("probes", f"{task},{setting}") for task in TASKS for setting in ("small", "paper")),
]


def experiment(name, argument):
    spec = importlib.util.spec_from_file_location(f"config_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.resolve(module.get_config(*([argument] if argument else [])))


def source(made):
    """What the data set of the experiment gives, as its `Info` would have it."""
    data, name = made.data, made.data.name
    if name == "probes":
        vocab = data.probes.symbols + 3
        return Input(kind="text", shape=(data.probes.length,), classes=vocab, vocab=vocab)
    if name == "listops":
        return Input(kind="tokens", shape=(data.listops.max_length,), classes=10, vocab=16)
    if name == "matching":
        return Input(kind="pair", shape=(data.text.max_len,), classes=2, vocab=257)
    side = data.pathfinder.size if name == "pathfinder" else data.image.size or 32
    pictures = ("mnist", "cifar", "imagenet")
    if name in ("pathfinder", "image_folder") or any(word in data.tfds for word in pictures):
        if data.image.layout == "pixels":
            return Input(kind="tokens", shape=(side**2,), classes=10, vocab=257)
        return Input(kind="image", shape=(side, side, 3), classes=10)
    return Input(kind="tokens", shape=(data.text.max_len,), classes=2, vocab=257)


def build(made):
    options = dict(made.model)
    return nnx.eval_shape(
        lambda: backbones.create(
            options.pop("name"), options, attention=made.attention, source=source(made),
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), ARENA, ids=lambda x: x)
def test_long_range_arenas_numbers(name, argument):
    made = experiment(name, argument)
    model = build(made)
    depth, width, heads, hidden, rate, steps, warmup, batch, length = ARENA[name, argument]
    assert len(model.stack.blocks) == depth
    assert (model.config.width, model.config.heads) == (width, heads)
    matrices = {
        leaf.shape for leaf in jax.tree.leaves(nnx.state(model.stack.blocks[0].mlp, nnx.Param))
    }
    assert {(width, hidden), (hidden, width)} <= matrices
    optimizer = made.optimizer
    assert (optimizer.learning_rate, optimizer.warmup) == (rate, warmup)
    assert (made.train.steps, made.data.batch_size, source(made).shape) == (steps, batch, (length,))
    text = name in ("listops", "imdb", "retrieval")
    assert (optimizer.name, optimizer.b1, optimizer.b2) == ("adamw", 0.9, 0.98)
    assert optimizer.weight_decay == (0.1 if text else 0.0)
    assert optimizer.schedule == ("rsqrt" if text else "cosine")
    assert optimizer.clip == (1.0 if argument == "128,released" else 0.0)
    assert model.config.pool == ("mean" if name == "pathfinder" else "cls")
    learned = name == "image" or argument.startswith("128")
    assert model.config.positions == ("learned" if learned else "sinusoidal")
    if name == "retrieval":
        assert model.interaction == "concat"


@pytest.mark.parametrize(("name", "argument"), REST, ids=lambda x: x or "(none)")
def test_the_other_settings_build(name, argument):
    made = experiment(name, argument)
    model = build(made)
    inputs = jnp.zeros((2, *source(made).shape), jnp.int32)
    if source(made).kind == "pair":
        inputs = jnp.stack([inputs, inputs], axis=1)
    if source(made).kind == "image":
        inputs = inputs.astype(jnp.float32)
    graph, state = nnx.split(model)
    out = jax.eval_shape(lambda s: nnx.merge(graph, s)(inputs, rngs=None), state)
    assert out.shape[0] == 2 and out.shape[-1] == source(made).classes


def test_no_option_is_hidden_behind_a_method_of_its_config():
    """config.data.probes.items would be a method: no flag could change an option of that name."""
    names = {name for key in configs.flatten(configs.base().to_dict()) for name in key.split(".")}
    assert not [name for name in sorted(names) if hasattr(ConfigDict, name)]


def test_data_are_read_where_they_should_be():
    made = experiment("imdb", "a,b/aclImdb,paper")
    assert (made.data.name, made.data.path, made.data.tfds) == ("text_folder", "a,b/aclImdb", "")
    made = experiment("imdb", "released")
    assert (made.data.name, made.data.path) == ("tfds", "")
    assert made.data.tfds == "imdb_reviews/plain_text"
    assert experiment("retrieval", "folder").data.path == "folder"
    for size in ("32", "64", "128", "256"):
        assert experiment("pathfinder", f"{size},paper").data.pathfinder == PRESETS[size]
    probe = experiment("probes", "mqar,paper").data.probes
    assert (probe.task, probe.length, probe.symbols, probe.recall) == ("mqar", 256, 8191, 16)
    assert experiment("probes", "duplication,paper").data.probes.symbols == 127


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("listops", "long", r"unknown setting of configs/listops\.py 'long'"),
        ("imdb", "a/b,papre", r"'papre'; did you mean 'paper'"),
        ("retrieval", "a/b,x", r"unknown setting of configs/retrieval\.py 'x'"),
        ("image", "mnist,x", r"unknown setting of configs/image\.py 'x'"),
        (
            "pathfinder",
            "33",
            r"unknown size of configs/pathfinder\.py '33'; known: 128, 256, 32, 64",
        ),
        ("pathfinder", "32,x", r"unknown setting of configs/pathfinder\.py 'x'"),
        ("probes", "mqra", r"unknown task of configs/probes\.py 'mqra'; did you mean 'mqar'"),
        ("probes", "mqar,x", r"unknown setting of configs/probes\.py 'x'"),
    ],
)
def test_a_setting_that_is_not_there_is_named(name, argument, message):
    with pytest.raises(UserError, match=message):
        experiment(name, argument)


def test_a_path_and_a_setting_are_told_apart():
    known = {"small": (), "paper": ()}
    split = settings.split
    assert split("", known, default="small") == ("", "small")
    assert split("paper", known, default="small") == ("", "paper")
    assert split("data/x", known, default="small") == ("data/x", "small")
    assert split("data/x,paper", known, default="small") == ("data/x", "paper")
