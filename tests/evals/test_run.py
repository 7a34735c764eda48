"""eval.py's work: the numbers of training again, from what the run saved."""

import csv
import dataclasses
import json
import shutil

import pytest

from efficient_attn.errors import UserError
from efficient_attn.evals.run import evaluate_run
from efficient_attn.train.workdir import read_json, read_lines
from tests.train.test_loop import experiment, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "run"
    config = experiment()
    train = dataclasses.replace(config.train, keep_last=3)
    result, _ = run(dataclasses.replace(config, train=train), path)
    return path, result


def test_last_is_exactly_what_training_reported(finished, tmp_path):
    path, result = finished
    found = evaluate_run(path, export=tmp_path / "p.csv")
    assert {name: found[name] for name in ("accuracy", "loss")} == result["test"]
    assert (found["split"], found["step"], found["examples"]) == ("test", 12, 359)
    assert read_json(path / "eval" / "test-12.json") == found
    assert (path / "eval" / "test-12.png").stat().st_size > 10_000
    assert set(found["classes"]) == {*map(str, range(10)), "macro avg", "weighted avg"}
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert hits / len(rows) == found["accuracy"]


def test_each_step_gives_the_numbers_of_its_log_line(finished):
    path, result = finished
    for line in read_lines(path / "metrics.jsonl"):
        if "validation/loss" in line:
            found = evaluate_run(path, split="validation", step=str(line["step"]))
            assert found["loss"] == line["validation/loss"]
            assert found["accuracy"] == line["validation/accuracy"]
    best = evaluate_run(path, split="validation", step="best")
    assert best["step"] == result["best"]["step"]
    assert best["loss"] == result["best"]["validation"]["loss"]


def test_limit_and_batch_size(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished[0].parent))
    found = evaluate_run("~/run", limit=40, batch_size=8)
    assert found["examples"] == 40
    assert json.loads((finished[0] / "eval" / "test-12.json").read_text())["examples"] == 40


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"step": "5"}, "no checkpoint --step=5 .*; saved are: last, best, 4, 8, 12"),
        ({"step": "newest"}, "no checkpoint --step=newest"),
        ({"batch_size": 7}, "batch_size 7 cannot be split evenly over 8 devices"),
    ],
)
def test_mistakes(finished, options, says):
    with pytest.raises(UserError, match=says):
        evaluate_run(finished[0], **options)


def test_another_attention_with_the_same_parameters(finished):
    """Softmax, and a performer with more features, which it has to draw, read its projections."""
    path, trained = finished[0], read_json(finished[0] / "config.json")["attention"]
    independent = "performer(features=8, projection='iid')"
    own, same, softmax, other, more = (
        evaluate_run(path, attention=attention, limit=40, batch_size=8)
        for attention in (None, trained, "softmax", independent, "performer(features=64)")
    )
    assert own == same, "the run's own features"
    assert len({found["loss"] for found in (own, softmax, other, more)}) == 4
    assert max(abs(own["loss"] - found["loss"]) for found in (softmax, other, more)) < 0.5
    assert read_json(path / "eval" / "test-12-performer(features=64).json") == more


def test_an_attention_with_other_parameters_is_refused(finished):
    says = "not have the run's parameters: .*core.keys.weight is absent in the run and"
    with pytest.raises(UserError, match=says):
        evaluate_run(finished[0], attention="linformer")
    with pytest.raises(UserError, match="unknown attention 'preformer'"):
        evaluate_run(finished[0], attention="preformer")


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "12" / "record" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="checkpoint 12 is damaged .*; others for --step: 4, 8"):
        evaluate_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", step="8")["step"] == 8
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


def test_no_run_and_no_checkpoint(finished, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate_run(tmp_path)
    shutil.copy(finished[0] / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate_run(tmp_path)
