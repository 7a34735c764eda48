"""Whole runs in this process: what they leave, and how they go on after a stop."""

import dataclasses
import io
import json
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from efficient_attn import data
from efficient_attn.data.base import Dataset
from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from efficient_attn.train import loop as loops
from efficient_attn.train.loop import train
from efficient_attn.train.workdir import read_json, read_lines

STEPS = 12


def experiment(*, model=(), optimizer=(), attention="performer(features=8, redraw=3)", **options):
    config = configs.base().to_dict()
    config["attention"] = attention
    config["model"] = {"name": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2} | dict(model)
    config["train"] |= {"steps": STEPS, "log_every": 3, "eval_every": 4, "eval_batch_size": 64}
    config["train"] |= {"ema": 0.9, **options}
    config["optimizer"] |= {"warmup": 2, "learning_rate": 0.01} | dict(optimizer)
    return configs.resolve(config)


class Terminal(io.StringIO):
    """Where a run prints; sends this process a signal when it reads a certain text."""

    def __init__(self, *, at=None, send=signal.SIGTERM):
        super().__init__()
        self.at, self.send = at, send

    def write(self, text):
        if self.at and self.at in text:
            self.at = None
            signal.raise_signal(self.send)
        return super().write(text)


def run(config, path, *, terminal=None, **options):
    terminal = terminal or Terminal()
    console = Console(file=terminal, width=200, soft_wrap=True)
    return train(config, path, console=console, **options), terminal.getvalue()


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of the same experiment share their compiled functions; each still restores its state."""
    built, build = {}, loops.build

    def cached(config, dataset, *, teacher):
        key = repr(config)
        if key not in built:
            built[key] = build(config, dataset, teacher=teacher)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "build", cached)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run that nothing happened to: (directory, result, what it printed)."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    result, said = run(experiment(), path)
    return path, result, said


TIMINGS = {"seconds", "steps_per_second", "examples_per_second", "input_wait"}


def without_timings(path):
    lines = read_lines(path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def files_of_arrays(path, step):
    """The stored arrays, read by orbax without any model."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(path / "checkpoints" / str(step) / "state")


def assert_same_run(path, other):
    """Same parameters, optimizer state and all, same metrics, to the bit."""
    mine, its = files_of_arrays(path, STEPS), files_of_arrays(other, STEPS)
    assert jax.tree.structure(mine) == jax.tree.structure(its)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(its), strict=True):
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert without_timings(path) == without_timings(other)
    mine, its = read_json(path / "result.json"), read_json(other / "result.json")
    for name in ("test", "validation", "best", "steps", "config_hash"):
        assert mine[name] == its[name]


def test_what_a_run_leaves(unbroken):
    path, result, said = unbroken
    assert read_json(path / "result.json") == result
    assert 0 <= result["test"]["accuracy"] <= 1 and result["test"]["loss"] > 0
    assert result["attention"] == "performer(features=8, redraw=3)"
    assert result["steps"] == STEPS and result["best"]["step"] in (4, 8, 12)
    assert result["versions"]["jax"] == jax.__version__
    config = read_json(path / "config.json")
    assert configs.fingerprint(config) == result["config_hash"]
    assert config["model"]["mlp_ratio"] == 4.0, "defaults of the backbone are written out"
    lines = read_lines(path / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "validation/loss" in line] == [4, 8, 12]
    assert Image.open(path / "curves.png").size[0] > 800
    assert list((path / "tensorboard").glob("events*"))
    assert f"{result['parameters']:,} parameters; digits: 1294 train" in said
    assert "step 6/12  loss" in said and "examples/s" in said
    numbers = f"loss {result['test']['loss']:.4f}  accuracy {result['test']['accuracy']:.4f}"
    assert f"test {numbers}  after 12 steps" in said


def test_a_finished_run_is_left_alone(unbroken):
    path, result, _ = unbroken
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    again, said = run(experiment(), path)
    assert again == result
    assert f"this run is finished: {path}/result.json" in said
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(unbroken, tmp_path, send):
    handler = signal.getsignal(send)
    terminal = Terminal(at="step 6/12", send=send)
    result, said = run(experiment(), tmp_path / "run", terminal=terminal)
    assert result is None and not (tmp_path / "run" / "result.json").exists()
    assert f"{send.name}: stopped and saved at step 6/12; run the same command again" in said
    assert signal.getsignal(send) == handler
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/loss": 1.0}\n{"step": 8, "tra')
    _, said = run(experiment(), tmp_path / "run")
    assert "going on from step 6" in said
    assert_same_run(tmp_path / "run", unbroken[0])


def test_a_damaged_checkpoint_costs_steps_and_not_the_result(unbroken, tmp_path):
    path = tmp_path / "run"
    run(experiment(), path, terminal=Terminal(at="step 6/12"))
    largest = max((path / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    _, said = run(experiment(), path)
    assert "step 6 is damaged" in said and "going on from step 4" in said
    assert_same_run(path, unbroken[0])


def test_killed_before_the_result_was_written(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    _, said = run(experiment(), tmp_path / "run")
    assert "going on from step 12" in said
    assert_same_run(tmp_path / "run", unbroken[0])


def test_another_config_is_refused_and_replace_moves_the_run_aside(unbroken, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(unbroken[0], path)
    other = dataclasses.replace(experiment(), seed=5, attention="softmax")
    with pytest.raises(UserError) as raised:
        run(other, path)
    said = str(raised.value)
    assert "holds the run of another config" in said and "--replace" in said
    assert "attention: 'performer(features=8, redraw=3)' there, 'softmax' now" in said
    assert "seed: 0 there, 5 now" in said
    assert (path / "result.json").exists()
    result, said = run(other, path, replace=True)
    assert f"is now in {path}/replaced-1" in said
    assert result["attention"] == "softmax"
    assert_same_run(path / "replaced-1", unbroken[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "perfromer"}, "performer"),
        ({"attention": "performer(featurs=8)"}, "features"),
        ({"model": {"name": "vitt"}}, "unknown model 'vitt'; did you mean 'vit'"),
        ({"model": {"headz": 2}}, "did you mean 'heads'"),
        ({"model": {"heads": 3}}, "3"),
        ({"model": {"patch": 3}}, "patches of 3 do not tile"),
        ({"model": {"name": "encoder", "patch": 2}}, "patch"),
        ({"backend": "pallas"}, r"backend='pallas', train.dtype='float32': .* not for this cpu"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(change, says, tmp_path):
    config = experiment()
    options = configs.to_dict(config)
    options |= {name: value for name, value in change.items() if name != "model"}
    options["model"] |= change.get("model", {})
    with pytest.raises(UserError, match=says):
        run(configs.resolve(options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Poisoned:
    """A source whose example `bad` holds a NaN; without one, `inputs` are the indices."""

    def __init__(self, source, *, bad=None):
        self.source, self.bad = source, bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]

    def gather(self, indices):
        batch = self.source.gather(indices)
        if self.bad is None:
            return batch | {"inputs": np.asarray(indices)}
        batch["inputs"][np.asarray(indices) == self.bad] = np.nan
        return batch


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    loaded = data.load(experiment().data)
    source = loaded.splits["train"]
    order = loops.train_batches(Poisoned(source), batch_size=64, seed=0)
    bad = [next(order)["inputs"] for _ in range(7)][6][0]  # first met in step 7
    splits = dict(loaded.splits) | {"train": Poisoned(source, bad=bad)}
    monkeypatch.setattr(loops.data, "load", lambda config: Dataset(loaded.info, splits))
    with pytest.raises(UserError) as raised:
        run(experiment(), tmp_path / "run")
    said = str(raised.value)
    assert "became NaN or infinite at step 7 (learning rate 0.00" in said
    assert "the checkpoint of step 4 is kept; lower optimizer.learning_rate" in said
    saved = files_of_arrays(tmp_path / "run", 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["params"]))
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_diagnostics_are_written_and_a_collapse_is_told_once(tmp_path):
    config = experiment(
        attention="performer(features=1)", diagnostics=2, eval_every=50, model={"depth": 2}
    )
    _, said = run(config, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    found = [line for line in lines if any(k.startswith("diagnostics/") for k in line)]
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12]
    assert any(k.endswith("/error") for k in found[0])
    assert said.count("an attention estimate has collapsed") == 1


def test_on_a_terminal_there_is_a_bar(tmp_path):
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=120)
    train(experiment(), tmp_path / "run", console=console)
    said = terminal.getvalue()
    assert "12/12" in said and "steps/s" in said and "examples/s" in said and "0:00:0" in said
    assert "validation loss" in said


def test_metrics_hold_no_number_that_json_cannot(tmp_path):
    from efficient_attn.train.logs import Metrics

    metrics = Metrics(tmp_path / "m.jsonl", tmp_path / "board", step=0)
    metrics.write(3, {"a": float("nan"), "b": 1.5})
    metrics.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 3, "a": None, "b": 1.5}
