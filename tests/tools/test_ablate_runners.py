"""What a training row reads of its data: once for a row and the next, nothing for its cost."""

import dataclasses

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Image, ListOps, Pathfinder, Probes
from efficient_attn.tools.ablate.load import load
from efficient_attn.train import loop
from tests.tools.sweeps import TRAINED, records, run, write

SMALL = {"train": 3, "validation": 2, "test": 2}
GENERATED = {
    "listops": Config(name="listops", listops=ListOps(4, 9, **SMALL, processes=1)),
    "probes": Config(name="probes", probes=Probes(length=16, recall=4, **SMALL)),
    "pathfinder": Config(name="pathfinder", pathfinder=Pathfinder(**SMALL, processes=1)),
    "pixels": Config(
        name="pathfinder",
        image=Image(layout="pixels"),
        pathfinder=Pathfinder(**SMALL, processes=1),
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_an_outline_is_described_and_shaped_as_the_set_itself(name, tmp_path, monkeypatch):
    black = {split: np.zeros((2, 32, 32), np.uint8) for split in SMALL}
    monkeypatch.setattr(data.pathfinder, "generate", lambda *_, **__: black)  # it takes seconds
    config = GENERATED[name]
    outline = data.outline(config)
    whole = data.load(dataclasses.replace(config, cache=str(tmp_path)))
    assert outline.info == whole.info
    blank, real = (s.splits["train"].gather([0])["inputs"] for s in (outline, whole))
    assert blank.shape == real.shape and blank.dtype == real.dtype


def test_rows_of_one_data_set_load_it_once_for_training_and_for_counting(tmp_path, monkeypatch):
    loaded, given, true = [], [], data.load

    def train(experiment, path, *, dataset):
        given.append(dataset)
        (path / "metrics.jsonl").touch()
        done = {"parameters": 1, "steps": 1, "seconds": 1.0}
        return done | {"validation": None, "test": {"accuracy": 0.5}}

    monkeypatch.setattr(data, "load", lambda config: loaded.append(config.name) or true(config))
    monkeypatch.setattr(loop, "train", train)
    file = write(tmp_path, TRAINED.replace("Training(config)", "Training(config, count=True)"))
    assert run(file)[0]
    assert loaded == ["digits"] and given[0] is given[1]
    found = [record["metrics"]["multiply_adds"] for record in records(tmp_path / "out")]
    assert len(found) == 2 and found[0] != found[1]


def test_the_cost_of_rows_on_generated_data_is_told_without_drawing_them(tmp_path, monkeypatch):
    monkeypatch.setattr(data.probes, "generate", lambda *_, **__: pytest.fail("it was drawn"))
    sweep = load(str(write(tmp_path, PROBED)), "small")
    cost = sweep.runner.cost({})
    assert cost.parameters > 0 and cost.multiply_adds > 0


PROBED = '''
"""A training on generated data."""

from configs.probes import get_config
from efficient_attn.tools.ablate import Column, Sweep, Training


def get_sweep(scale):
    return Sweep(
        title="Copy", source="Nobody", rows=[("softmax", {})], runner=Training(get_config("copy")),
        columns=[Column("accuracy", "accuracy %", 100)],
    )
'''
