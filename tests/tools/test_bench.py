"""The bench of training steps: rows that work, rows that say why not."""

import csv

import numpy as np
import pytest

from efficient_attn.backbones import BACKBONES
from efficient_attn.errors import UserError
from efficient_attn.tools import bench

TINY = {"depth": 1, "width": 16, "heads": 2}


def asked(**changed):
    given = {
        "model": "causal_lm", "attention": "linear", "backend": "auto", "length": 16, "batch": 2,
        "dtype": "float32", "options": TINY, "steps": 3,
    }  # fmt: skip
    return bench.Asked(**given | changed)


def test_a_run_writes_each_row_and_the_reason_of_one_that_fails(tmp_path, capsys):
    options = '{"depth": 1, "width": 16, "heads": 2}'
    bench.main(
        ["", "linear", "pool", "--lengths", "16", "--batch=2", "--steps=3", f"--options={options}",
         f"--out={tmp_path}/bench"]
    )  # fmt: skip
    good, bad = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert good["reason"] == "" and float(good["tokens_per_second"]) > 0
    assert float(good["tokens_per_second"]) == pytest.approx(32 / float(good["step_seconds"]))
    # embeddings and scores are one table; a block's 12 E^2 for each of 32 tokens, and its scores
    least = 3 * 32 * (12 * 16**2 + 256 * 16)
    assert least < int(good["multiply_adds"]) < 1.3 * least
    # parameters and two moments of AdamW in float32, at least
    assert int(good["peak_bytes"]) > 3 * 4 * int(good["parameters"])
    assert bad["tokens_per_second"] == "" and "mixes the rows and columns" in bad["reason"]
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_not_run(monkeypatch):
    monkeypatch.setattr(bench, "_free", lambda: 1000)
    row = bench.measure(asked())
    assert row.reason.startswith("out of memory: it takes ") and row.step_seconds is None
    assert row.peak_bytes is not None and row.peak_bytes > 1000


def test_a_backend_that_is_refused_is_a_row():
    row = bench.measure(asked(backend="cudnn", attention="softmax"))
    assert row.tokens_per_second is None and "cudnn" in row.reason


@pytest.mark.parametrize("model", BACKBONES)
def test_every_backbone_has_its_batches(model):
    info = bench.describe(model, 16)
    batch = bench.draw(info, 2, 0)
    assert batch["label"].shape == batch["weight"].shape == ((2, 16) if info.per_token else (2,))
    assert batch["label"].max() < info.classes
    inputs = batch["inputs"]["target"] if isinstance(batch["inputs"], dict) else batch["inputs"]
    assert inputs.shape[0] == 2 and (inputs.dtype == np.float32 or inputs.min() > 0)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="15 patches are no square"):
        bench.describe("vit", 15)
    with pytest.raises(UserError, match="did you mean 'encoder'"):
        bench.describe("encoders", 16)
    with pytest.raises(UserError, match="--steps=0 must be positive"):
        bench.main(["", "linear", "--steps=0"])
