"""Published networks by `config.model.name`: their configs as JSON, and a run from end to end."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from efficient_attn import backbones
from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from efficient_attn.train.program import complete
from efficient_attn.train.workdir import read_json
from tests.conftest import ROOT


def experiment(model):
    options = configs.base().to_dict()
    options["model"], options["attention"] = model, "native"
    return configs.resolve(options)


@pytest.mark.parametrize("name", backbones.names())
def test_a_config_survives_json(name):
    whole = complete(experiment({"name": name}))
    again = complete(configs.resolve(configs.to_dict(whole)))
    assert configs.to_dict(again) == configs.to_dict(whole)
    options = dict(again.model)
    assert backbones.configure(options.pop("name"), options) == backbones.configure(name, {})


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_keep_rate_out_of_range(rate):
    with pytest.raises(UserError, match=r"keep_rate must be in \(0, 1\], not"):
        complete(experiment({"name": "evit_small", "keep_rate": rate}))


def folder(path):
    """Two classes of images, one of them damaged."""
    random = np.random.RandomState(0)
    for name, level in (("dark", 0), ("light", 120)):
        (path / name).mkdir(parents=True)
        for n in range(20):
            pixels = (level + random.randint(0, 120, (40, 44, 3))).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(path / name / f"{n:02}.png")
    damaged = path / "dark" / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:600])
    return path


def run(script, *arguments):
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_mobilevit_is_trained_and_evaluated(tmp_path):
    """With batch norm, an average of it, augmentation on demand, and a damaged image."""
    where = f"--workdir={tmp_path / 'run'}"
    command = [
        f"--config=configs/image.py:{folder(tmp_path / 'images')},mobilevit_xxs", where,
        "--config.data.image.size=64", "--config.data.image.memory_mb=0",
        "--config.data.on_error=skip", "--config.data.batch_size=8",
        "--config.data.augment.crop=(0.5, 1.0)", "--config.data.augment.operations=2",
        "--config.data.augment.flip=0.5", "--config.data.augment.erase=0.25",
        "--config.data.augment.mixup=0.8", "--config.data.augment.cutmix=1.0",
        "--config.train.ema=0.9", "--config.optimizer.warmup=1", "--config.train.log_every=1",
        "--config.train.eval_batch_size=8", "--config.train.eval_every=2",
    ]  # fmt: skip
    done = run("train.py", *command, "--config.train.steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_json(tmp_path / "run" / "result.json")
    assert result["steps"] == 2 and np.isfinite(result["test"]["loss"])
    evaluated = run("eval.py", where)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    found = read_json(tmp_path / "run" / "eval" / "test-2.json")
    np.testing.assert_allclose(found["loss"], result["test"]["loss"], rtol=1e-5)
