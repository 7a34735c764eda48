"""Whole runs of a model that tells tokens: what they leave, and how they go on after a stop."""

import csv
import io
import math

import pytest
from rich.console import Console

from efficient_attn.evals import run as evals
from efficient_attn.train import config as configs
from efficient_attn.train import loop as loops
from efficient_attn.train.program import compile_for
from efficient_attn.train.workdir import read_json, read_lines
from tests.train.stub import Teller
from tests.train.test_loop import STEPS, Terminal, assert_same_run, run

TEXT = "".join(f"the {n}th line of a text\n" for n in range(60))


def experiment(path, **text):
    """No two epochs of 12 rows are cut alike, and 12 steps of 8 rows are 8 epochs."""
    config = configs.base().to_dict()
    config["data"] |= {"name": "text_files", "path": str(path), "batch_size": 8}
    config["data"]["text"] |= {"max_len": 80, "tokenizer": "chars"} | text
    config["model"] = {"name": "encoder", "width": 16, "depth": 1, "heads": 2}
    config["train"] |= {"steps": STEPS, "log_every": 3, "eval_every": 4, "eval_batch_size": 8}
    config["optimizer"] |= {"warmup": 2, "learning_rate": 0.05}
    return configs.resolve(config)


@pytest.fixture(scope="module", autouse=True)
def stub():
    """Every run trains the stub."""
    built = {}

    def build(config, dataset, teacher=None):
        key = repr(config)
        if key not in built:
            vocab = dataset.info.vocab
            built[key] = compile_for(lambda rngs: Teller(vocab=vocab, rngs=rngs), config)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "build", build)
        patch.setattr(evals, "build", build)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def unbroken(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    result, said = run(experiment(file), path)
    return path, result, said


def test_what_a_run_leaves(unbroken):
    path, result, said = unbroken
    test = result["test"]
    assert test["bits_per_character"] == pytest.approx(test["loss"] / math.log(2))
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    lines = read_lines(path / "metrics.jsonl")
    logged = [line for line in lines if "train/loss" in line]
    losses = [line["train/loss"] for line in logged]
    assert losses == sorted(losses, reverse=True)
    for line in logged:
        # the end that opens the text is told by no one: 1 in 1,400
        expected = line["train/loss"] / math.log(2)
        assert line["train/bits_per_character"] == pytest.approx(expected, rel=2e-3)
    found = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert result["best"]["step"] == min(found, key=found.get), "the best is the lowest loss"
    assert f"bits/character {test['bits_per_character']:.4f}  after" in said
    assert "step 6/12  loss" in said


def test_stopped_in_the_middle_it_ends_the_same(file, unbroken, tmp_path):
    result, _ = run(experiment(file), tmp_path / "run", terminal=Terminal(at="step 6/12"))
    assert result is None
    _, said = run(experiment(file), tmp_path / "run")
    assert "going on from step 6" in said
    assert_same_run(tmp_path / "run", unbroken[0])


def test_masked_tokens_too(file, tmp_path):
    masked = experiment(file, predict="masked")
    whole, _ = run(masked, tmp_path / "whole")
    assert whole["test"]["perplexity"] > 1 and "bits_per_character" not in whole["test"]
    run(masked, tmp_path / "run", terminal=Terminal(at="step 6/12"))
    run(masked, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_eval_gives_the_numbers_of_training(unbroken, tmp_path):
    path, result, _ = unbroken
    found = evals.evaluate_run(path, export=tmp_path / "p.csv")
    assert {name: found[name] for name in result["test"]} == result["test"]
    held_out = round(0.2 * len(TEXT))
    assert found["tokens"] == held_out and found["examples"] == -(-held_out // 80)
    assert "classes" not in found
    console = Console(file=io.StringIO(), width=200)
    evals.show(found, console)
    said = f"test, softmax, step 12, {held_out} tokens: loss {found['loss']:.4f}"
    assert said in console.file.getvalue()
    assert (path / "eval" / "test-12.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == held_out
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert hits / held_out == pytest.approx(found["accuracy"])
    best = evals.evaluate_run(path, split="validation", step="best")
    assert best["loss"] == result["best"]["validation"]["loss"]
    assert read_json(path / "eval" / f"validation-{best['step']}.json") == best


def test_packed_documents_run(file, tmp_path):
    result, _ = run(experiment(file, packing="pack", documents="lines"), tmp_path / "run")
    assert result["test"]["accuracy"] > 0
