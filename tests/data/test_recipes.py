"""The settings of configs/ that come from a paper's code, number by number, and what is refused."""

import importlib

import pytest

from efficient_attn.data import Config
from efficient_attn.errors import UserError
from efficient_attn.train import config as configs


def experiment(name, argument):
    module = importlib.import_module(f"configs.{name}")
    return configs.resolve(module.get_config(argument))


@pytest.mark.parametrize(
    ("size", "depth", "heads", "pool", "positions", "dropout", "batch", "steps", "clip"),
    [
        ("32", 4, 4, "mean", "sinusoidal", 0.2, 512, 312 * 200, 0.0),
        ("64", 2, 4, "cls", "learned", 0.1, 256, 625 * 200, 0.0),
        ("128", 1, 2, "mean", "learned", 0.1, 64, 2500 * 200, 1.0),
        ("256", 2, 4, "cls", "learned", 0.1, 32, 5000 * 100, 0.0),
    ],
)
def test_pathfinder_as_long_range_arena_released_it(
    size, depth, heads, pool, positions, dropout, batch, steps, clip
):
    made = experiment("pathfinder", f"{size},released")
    assert made.model == {
        "name": "encoder", "width": 32, "depth": depth, "heads": heads, "mlp_ratio": 1.0,
        "pool": pool, "positions": positions, "dropout": dropout,
    }  # fmt: skip
    assert (made.data.batch_size, made.train.steps, made.optimizer.clip) == (batch, steps, clip)
    assert made.optimizer.warmup == made.train.eval_every == 160_000 // batch
    assert made.optimizer.learning_rate == 1e-3


def test_mqar_as_zoology_released_it():
    made = experiment("probes", "mqar,paper")
    probes = made.data.probes
    assert (probes.train, probes.validation, probes.test) == (100_000, 3000, 3000)
    assert made.data.batch_size * made.train.steps == 64 * 100_000


def test_a_set_of_tfds_may_have_a_config(tmp_path):
    data = experiment("image", "emnist/letters").data
    assert (data.name, data.tfds, data.path) == ("tfds", "emnist/letters", "")
    for name in (f"{tmp_path}", "./mine", "~/mine", f"{tmp_path}/none"):
        data = experiment("image", name).data
        assert (data.name, data.tfds, data.path) == ("image_folder", "", name)


@pytest.mark.parametrize("cls", [Config, configs.Experiment])
def test_a_seed_has_32_bits(cls):
    assert cls(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(UserError, match=r"^seed must be less than 2\*\*32, not 4294967296$"):
        cls(seed=2**32)
