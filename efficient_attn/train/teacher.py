"""The network that `config.distill` learns from: a run of ours, or a published one's weights."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from efficient_attn import backbones, data
from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.evals.run import restore
from efficient_attn.train.config import Experiment, resolve
from efficient_attn.train.objective import Teacher
from efficient_attn.train.program import compile_for, creator
from efficient_attn.train.task import score
from efficient_attn.train.workdir import Workdir, read_json

WHERE = "config.distill.teacher"


def load(experiment: Experiment, info: data.Info) -> Teacher | None:
    """The teacher of a student on data of this description; None where there is none.

    Raises:
        UserError: no such run or network, weights that are missing or of another network, classes
            or images that are not the student's.
    """
    distill = experiment.distill
    if distill.kind == "none":
        return None
    try:
        if Path(distill.teacher).is_dir():
            model = _of_run(experiment, info)
        else:
            model = _published(experiment, info)
    except UserError as error:
        raise UserError(f"{WHERE}={distill.teacher!r}: {error}") from None
    return Teacher(*nnx.split(model))


def _of_run(experiment: Experiment, info: data.Info) -> nnx.Module:
    workdir = Workdir(experiment.distill.teacher)
    require(workdir.config.exists(), "holds no run: it has no config.json")
    theirs = resolve(read_json(workdir.config))
    _compare(_info(theirs.data, experiment.data, info), info)
    here = dataclasses.replace(  # its batches are ours, and it makes no steps
        theirs, data=experiment.data, train=dataclasses.replace(theirs.train, accumulate=1)
    )
    program = compile_for(creator(here, info), here, devices=1)
    _, state = restore(workdir, program, experiment.distill.checkpoint, score(info))
    return program.evaluated(state)


def _info(theirs: data.Config, ours: data.Config, info: data.Info) -> data.Info:
    """What the teacher's data are, read again only where its config says otherwise than ours."""
    plain = dataclasses.replace(
        theirs, batch_size=ours.batch_size, augment=ours.augment, seed=ours.seed
    )
    if plain == ours:
        return info
    image = dataclasses.replace(theirs.image, memory_mb=0)  # the description alone is wanted
    return data.load(dataclasses.replace(theirs, image=image)).info


def _compare(theirs: data.Info, ours: data.Info) -> None:
    for what, a, b in (
        ("reads", theirs.kind, ours.kind),
        ("reads inputs of the shape", theirs.shape, ours.shape),
        ("tells the classes", theirs.labels, ours.labels),
        ("has a vocabulary of", theirs.vocab, ours.vocab),
    ):
        require(
            a == b,
            f"the teacher {what} {_brief(a)}, the student {_brief(b)}; they must be the same",
        )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _published(experiment: Experiment, info: data.Info) -> nnx.Module:
    distill = experiment.distill
    require(
        distill.teacher in backbones.VARIANTS,
        "is neither the directory of a run nor a published network; "
        "efficient_attn.backbones.names() lists those",
    )
    require(distill.weights != "", "a published network needs config.distill.weights")
    source = backbones.Input(kind=info.kind, shape=info.shape, classes=info.classes)
    model = backbones.create(
        distill.teacher, source=source, backend=experiment.backend,
        dtype=jnp.dtype(experiment.train.dtype),
    )  # fmt: skip
    backbones.load(model, distill.weights)
    return model
