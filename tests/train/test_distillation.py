"""Learning from a teacher: its losses, both kinds of teacher, and what cannot be one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import backbones, data
from efficient_attn.errors import UserError
from efficient_attn.evals.run import evaluate_run
from efficient_attn.train import config as configs
from efficient_attn.train import teacher as teachers
from efficient_attn.train.config import Distill
from efficient_attn.train.objective import Teacher, distillation
from efficient_attn.train.program import build, compile_for
from tests.train.stub import Stub, batch, equal
from tests.train.stub import experiment as plain
from tests.train.test_loop import run

TINY = {"patch": 4, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
DEIT = TINY | {"name": "deit_tiny_distilled_patch16_224"}


def experiment(*, model=TINY | {"name": "vit"}, distill=(), **others):
    options = configs.base().to_dict()
    options["model"], options["distill"] = model, options["distill"] | dict(distill)
    options["train"] |= {"steps": 4, "log_every": 2, "eval_every": 2, "eval_batch_size": 64}
    options["optimizer"] |= {"warmup": 2}
    for name, value in others.items():
        options[name] |= value
    return configs.resolve(options)


def test_soft_is_hintons_and_hard_is_deits():
    ours, theirs = (jax.random.normal(jax.random.key(i), (7, 5)) for i in range(2))
    p, q = (jax.nn.softmax(x / 2.5) for x in (theirs, ours))
    expected = 2.5**2 * (p * jnp.log(p / q)).sum(-1)
    found = distillation(ours, theirs, Distill("soft", "x", temperature=2.5))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    found = distillation(ours, theirs, Distill("hard", "x"))
    label = theirs.argmax(-1)
    np.testing.assert_allclose(
        found, optax.softmax_cross_entropy_with_integer_labels(ours, label), rtol=1e-6
    )


class Two(nnx.Module):
    """Two classifiers."""

    def __init__(self, *, rngs):
        self.parts = nnx.List([Stub(rngs=rngs), Stub(rngs=rngs)])

    def heads(self, inputs, *, rngs):
        return tuple(part(inputs, rngs=rngs) for part in self.parts)

    def __call__(self, inputs, *, rngs):
        first, second = self.heads(inputs, rngs=rngs)
        return (first + second) / 2


class One(Stub):
    """One of them."""

    def heads(self, inputs, *, rngs):
        return (self(inputs, rngs=rngs),)


def gradient(student, distill, accumulate=1):
    """Of the first step, from sgd's change, and by hand."""
    options = plain(
        accumulate=accumulate, label_smoothing=0.1,
        optimizer={"name": "sgd", "momentum": 0.0, "learning_rate": 1.0, "clip": 0.0, "warmup": 0,
                   "weight_decay": 0.0, "schedule": "constant"},
    )  # fmt: skip
    options = dataclasses.replace(options, distill=distill)
    teacher = Stub(rngs=nnx.Rngs(params=9))
    built = compile_for(
        lambda rngs: student(rngs=rngs), options, devices=1, teacher=Teacher(*nnx.split(teacher))
    )
    state = built.init()
    before = jax.tree.map(jnp.copy, state["params"])
    model = built.evaluated(state)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    data, said = batch(), teacher(batch()["inputs"], rngs=None)

    def loss(params):
        heads = nnx.merge(graph, params, rest).heads(data["inputs"], rngs=None)
        target = optax.smooth_labels(jax.nn.one_hot(data["label"], 3), 0.1)
        labels = optax.softmax_cross_entropy(heads[0], target)
        learned = distillation(heads[-1], said, distill)
        return ((1 - distill.weight) * labels + distill.weight * learned).mean()

    expected = nnx.to_pure_dict(jax.grad(loss)(params))
    after, _ = built.step(state, data)
    return jax.tree.map(jnp.subtract, before, after["params"]), expected


@pytest.mark.parametrize("student", [One, Two])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_labels_and_teacher_share_the_objective(student, kind):
    distill = Distill(kind, "x", weight=0.3)
    found, expected = gradient(student, distill)
    equal(found, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_learn_the_same():
    found, expected = gradient(Two, Distill("soft", "x"), accumulate=4)
    equal(found, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A run whose model becomes a teacher."""
    path = tmp_path_factory.mktemp("master") / "run"
    run(experiment(), path)
    return path


def test_a_run_teaches_and_is_not_needed_any_more(master, tmp_path):
    config = experiment(
        model=DEIT, distill={"kind": "hard", "teacher": str(master), "checkpoint": "best"}
    )
    config = dataclasses.replace(config, attention="native")
    teacher = teachers.load(config, data.load(config.data).info)
    said = nnx.merge(teacher.graphdef, teacher.arrays)(jnp.zeros((2, 8, 8, 1)))
    assert said.shape == (2, 10)
    result, _ = run(config, tmp_path / "run")
    assert result["steps"] == 4
    saved = tmp_path / "run" / "config.json"
    saved.write_text(saved.read_text().replace(str(master), "/gone"))
    found = evaluate_run(tmp_path / "run")
    np.testing.assert_allclose(found["loss"], result["test"]["loss"], rtol=1e-6)


def test_a_published_network_teaches(tmp_path):
    name = "deit_tiny_patch16_224"
    info = data.Info("image", (32, 32, 3), ("a", "b", "c"), None)
    known = backbones.create(name, num_classes=3, image_size=32)
    backbones.save(known, tmp_path / "deit.safetensors", names="timm")
    distill = {"kind": "soft", "teacher": name, "weights": str(tmp_path / "deit.safetensors")}
    teacher = teachers.load(experiment(distill=distill), info)
    loaded = nnx.state(nnx.merge(teacher.graphdef, teacher.arrays), nnx.Param)
    equal(nnx.to_pure_dict(loaded), nnx.to_pure_dict(nnx.state(known, nnx.Param)))
    start = f"config.distill.teacher='{name}': .* is of another network: "
    with pytest.raises(UserError, match=start + r"classifier\.linear\.\w+ is .*10"):
        ten = dataclasses.replace(info, labels=tuple("abcdefghij"))
        teachers.load(experiment(distill=distill), ten)
    with pytest.raises(UserError, match=start + "positions is"):
        large = dataclasses.replace(info, shape=(48, 48, 3))
        teachers.load(experiment(distill=distill), large)


@pytest.mark.parametrize(
    ("distill", "says"),
    [
        ({"teacher": "deit_tiny_patch16_224"}, "a published network needs config.distill.weights"),
        ({"teacher": "deit_tiny_patch16_224", "weights": "/no"}, "'deit_.*': no file /no"),
        ({"teacher": "nobody"}, "'nobody': is neither the directory of a run nor a published"),
        ({"teacher": "."}, "holds no run: it has no config.json"),
        ({"teacher": "MASTER", "checkpoint": "3"}, "there is no checkpoint --step=3"),
    ],
)
def test_a_teacher_that_is_missing(distill, says, master):
    distill = distill | {"kind": "soft"}
    distill["teacher"] = distill["teacher"].replace("MASTER", str(master))
    config = experiment(distill=distill)
    info = data.load(config.data).info
    if distill["teacher"].startswith("deit"):
        info = dataclasses.replace(info, shape=(32, 32, 3))
    with pytest.raises(UserError, match=says):
        teachers.load(config, info)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": tuple("abcdefghij")}, r"tells the classes \('0', .*, the student \('a'"),
        ({"shape": (16, 16, 1)}, r"inputs of the shape \(8, 8, 1\), the student \(16, 16, 1\)"),
    ],
)
def test_a_run_of_other_classes_or_images(change, says, master):
    config = experiment(distill={"kind": "soft", "teacher": str(master)}, data={"validation": 0.2})
    info = dataclasses.replace(data.load(config.data).info, **change)
    with pytest.raises(UserError, match=says):
        teachers.load(config, info)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "soft"}, "kind='soft' needs a teacher"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"weight": 1.5}, r"weight must be in \[0, 1\], not 1.5"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(UserError, match=says):
        Distill(**options)


def test_a_model_asks_for_losses_of_its_own():
    """DynamicViT: the ratio of what it keeps is part of the objective, and of nothing else."""
    model = TINY | {"name": "dynamicvit_deit_small", "layers": (1,), "keep_rate": 0.5}
    grads = []
    for weight in (0.0, 50.0):
        config = experiment(
            model=model | {"ratio_weight": weight},
            optimizer={"name": "sgd", "learning_rate": 1.0, "clip": 0.0, "weight_decay": 0.0},
        )
        config = dataclasses.replace(config, attention="native")
        dataset = data.load(config.data)
        built = build(config, dataset, devices=1)
        state = built.init()
        before = jax.tree.map(jnp.copy, state["params"]["predictors"])
        given = dataset.splits["train"].gather(np.arange(64))
        state, metrics = built.step(state, given)
        grads.append(jax.tree.map(jnp.subtract, before, state["params"]["predictors"]))
        assert np.isfinite(float(metrics["loss"])) and "ratio" not in str(state["rest"])
    sizes = [float(optax.tree.norm(grad)) for grad in grads]
    assert sizes[1] > 3 * sizes[0] > 0
