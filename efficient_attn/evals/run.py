"""Evaluate what a run has saved: restored from the run's own config.json."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from efficient_attn import data
from efficient_attn.data.translation import Pairs
from efficient_attn.errors import UserError, unknown
from efficient_attn.evals import bleu, report
from efficient_attn.evals.predict import predict, summarize
from efficient_attn.train.checkpoint import Checkpoints, Damaged
from efficient_attn.train.config import Distill, Experiment, resolve
from efficient_attn.train.program import Program, State, build
from efficient_attn.train.task import Score, headline, score
from efficient_attn.train.workdir import Workdir, read_json, write_json


def evaluate_run(
    path: str | Path,
    *,
    split: str = "test",
    step: str = "last",
    attention: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    export: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a split; write eval/SPLIT-STEP.json and .png into the run.

    step: a number, "last", or "best" by validation.
    attention: in place of the run's `config.attention`, one that has the same parameters; its name
        is added to those of the files.
    limit: take the first so many examples only.
    batch_size: the run's `train.eval_batch_size` by default, which gives the very numbers of
        training.
    export: a file for the prediction of each example, as CSV.

    Returns what the JSON file holds: "accuracy", "loss", "step", "examples", and "classes" where
    examples are classified, or "tokens", "perplexity", ... where tokens are told,
    and "bleu" with its "signature" of translations.

    Raises:
        UserError: no such run, checkpoint or split; a checkpoint that cannot be read; an attention
            whose parameters are others.
    """
    run = _open(path, split, step, attention, batch_size)
    size = run.experiment.train.eval_batch_size
    how = {"batch_size": size, "limit": limit}
    outputs = predict(run.program, run.state, run.source, **how)
    found = {
        "split": split,
        "step": run.step,
        "attention": run.experiment.attention,
        "examples": len(run.source) if limit is None else min(limit, len(run.source)),
        **summarize(outputs, run.info),
    }
    if run.info.per_token:
        found["tokens"] = len(outputs["label"])
    else:
        found["classes"] = report.per_class(outputs, run.info.labels)
    name = f"{split}-{run.step}"
    if attention is not None:
        name += "-" + re.sub(r"[^\w()=,.+*-]", "", attention)[:150]
    folder = Workdir(path).path / "eval"
    _draw(outputs, run.info, folder / f"{name}.png", title=_title(run.experiment, found))
    if isinstance(run.source, Pairs):
        file = folder / f"{name}.txt"
        found |= bleu.evaluate(run.program, run.state, run.source, path=file, **how)
    write_json(folder / f"{name}.json", found)
    if export is not None:
        names = run.info.labels or tuple(map(str, range(run.info.classes)))
        report.export_predictions(outputs, names, Path(export))
    return found


class _Run(NamedTuple):
    """A checkpoint of a run beside the data it is evaluated on."""

    experiment: Experiment
    info: data.Info
    source: data.Source
    program: Program
    step: int
    state: State


def _open(
    path: str | Path, split: str, step: str, attention: str | None, batch_size: int | None
) -> _Run:
    workdir = Workdir(path)
    if not workdir.config.exists():
        raise UserError(f"{workdir.path} holds no run: it has no config.json")
    experiment = resolve(read_json(workdir.config))
    experiment = dataclasses.replace(experiment, distill=Distill())  # its teacher may be gone
    dataset = data.load(experiment.data)
    if split not in dataset.splits:
        raise unknown("split", split, dataset.splits)
    if len(dataset.splits[split]) == 0:
        raise UserError(f"the {split} split is empty")
    if batch_size is not None:
        train = dataclasses.replace(experiment.train, eval_batch_size=batch_size)
        experiment = dataclasses.replace(experiment, train=train)
    program = build(experiment, dataset)
    number, state = restore(workdir, program, step, score(dataset.info))
    if attention is not None:
        experiment = dataclasses.replace(experiment, attention=attention)
        own, program = program, build(experiment, dataset)
        state = transplant(state, own, program, attention)
    return _Run(experiment, dataset.info, dataset.splits[split], program, number, state)


def restore(workdir: Workdir, program: Program, step: str, score: Score) -> tuple[int, State]:
    """The number and the state of a checkpoint: `step` is a number, "last" or "best".

    Raises:
        UserError: no such checkpoint, or one that cannot be read.
    """
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.path} has no checkpoint yet")
    checkpoints = Checkpoints(workdir.checkpoints, score=score, read_only=True)
    try:
        number = _choose(step, checkpoints.steps(), checkpoints.best(), workdir)
        state, _ = checkpoints.restore(number, program.abstract)
    except Damaged as error:
        others = ", ".join(str(s) for s in checkpoints.steps() if s != number) or "none"
        raise UserError(
            f"checkpoint {number} is damaged ({error}); others for --step: {others}"
        ) from None
    finally:
        checkpoints.close()
    return number, state


def transplant(state: State, own: Program, other: Program, attention: str) -> State:
    """A run's state for the program of another attention that has the same parameters.

    Buffers (random projections, ...) are the run's where both programs begin with the same, else
    those that `other` begins with.

    Raises:
        UserError: a parameter that only one of them has, or has in another shape.
    """
    mine, others = (_leaves(program.abstract["params"]) for program in (own, other))
    for path in sorted(mine.keys() | others.keys()):
        run, there = (f"{x[path].shape}" if path in x else "absent" for x in (mine, others))
        if run != there:
            raise UserError(
                f"--attention={attention} does not have the run's parameters: {path} is {run} in "
                f"the run and {there} there"
            )
    kept = _leaves(state["rest"])
    before, drawn = (program.init()["rest"] for program in (own, other))
    first = _leaves(before)

    def pick(path, new):
        same = _name(path) in first and np.array_equal(first[_name(path)], new)
        return kept[_name(path)] if same else new

    return state | {"rest": jax.tree_util.tree_map_with_path(pick, drawn)}


def _leaves(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _choose(step: str, saved: Sequence[int], best: int | None, workdir: Workdir) -> int:
    if not saved:
        raise UserError(f"{workdir.path} has no checkpoint yet")
    named = {"last": saved[-1], "best": best, **{str(number): number for number in saved}}
    if named.get(step) is None:
        raise UserError(
            f"there is no checkpoint --step={step} in {workdir.path}; saved are: last, "
            + ", ".join(["best"] * (best is not None) + [str(number) for number in saved])
        )
    return named[step]


def _draw(outputs: Mapping[str, np.ndarray], info: data.Info, picture: Path, *, title: str) -> None:
    picture.parent.mkdir(exist_ok=True)
    if info.per_token:
        report.draw_positions(outputs, picture, title=title)
    else:
        report.draw_confusion(outputs, info.labels, picture, title=title)


def _title(experiment: Experiment, found: dict[str, Any]) -> str:
    return (
        f"{experiment.data.name} {found['split']}, {experiment.attention}, step {found['step']}: "
        + (headline(found) if "tokens" in found else f"{100 * found['accuracy']:.2f} %")
    )


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `evaluate_run` found."""
    if "classes" in found:
        table = Table("class", "precision", "recall", "F1", "examples")
        for name, scores in found["classes"].items():
            numbers = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1-score")]
            table.add_row(escape(name), *numbers, f"{scores['support']:.0f}")
        console.print(table)
    count = f"{found['tokens']} tokens" if "tokens" in found else f"{found['examples']} examples"
    console.print(
        f"{found['split']}, {found['attention']}, step {found['step']}, {count}: {headline(found)}",
        markup=False,
    )
    if "bleu" in found:
        bleu.show(found, console)
