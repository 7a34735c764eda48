"""The gradient of an experiment's objective: labels, a teacher, and what the model asks for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.backbones.base import Objective
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.train import mixing
from efficient_attn.train.config import Distill, Experiment
from efficient_attn.train.task import CrossEntropy

MIXING = 1 << 30  # folded into a step's key; micro-batches fold in their numbers, from 0


class Teacher(NamedTuple):
    """A network to learn from, taken apart; its arrays are an argument of the step."""

    graphdef: nnx.GraphDef
    arrays: Any


def take_apart(model: nnx.Module) -> tuple[dict, dict]:
    """The parameters, and what else the model carries: buffers, running statistics."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def make_gradient(
    graphdef: nnx.GraphDef, experiment: Experiment, teacher: nnx.GraphDef | None
) -> Callable:
    """(params, rest, batch, key, teacher's arrays) -> gradient, new rest, {"objective", "loss",
    "accuracy"}.

    Each is a mean over all that counts in the batch, examples or tokens by their weight, whatever
    number of micro-batches it is taken in. Only what a model computes of a batch as a whole, such
    as the statistics of batch norm, is that of a micro-batch.
    """
    train = experiment.train
    grad = jax.grad(_make_loss(graphdef, experiment, teacher), has_aux=True)

    def gradient(params, rest, batch, key, known):
        total = batch["weight"].sum()
        batch = batch | {"weight": batch["weight"] / jnp.where(total > 0, total, 1)}
        batch = mixing.mix(batch, jax.random.fold_in(key, MIXING), experiment.data.augment)
        if train.accumulate == 1:
            grads, (rest, sums) = grad(params, rest, batch, key, known)
            return grads, rest, sums

        def add(carry, part):
            total, rest = carry
            index, micro = part
            grads, (rest, sums) = grad(params, rest, micro, jax.random.fold_in(key, index), known)
            return (jax.tree.map(jnp.add, total, grads), rest), sums

        micro = jax.tree.map(lambda x: _cut(x, train.accumulate), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        parts = (jnp.arange(train.accumulate), micro)
        (grads, rest), sums = jax.lax.scan(add, (zeros, rest), parts)
        return grads, rest, jax.tree.map(jnp.sum, sums)

    return gradient


def _make_loss(
    graphdef: nnx.GraphDef, experiment: Experiment, teacher: nnx.GraphDef | None
) -> Callable:
    task, distill = CrossEntropy(experiment.train.label_smoothing), experiment.distill

    def loss(params, rest, batch, key, known):
        model = nnx.merge(graphdef, params, rest)
        call = model if teacher is None else model.heads
        found, asked = nnx.capture(call, Objective)(batch["inputs"], rngs=make_rngs(key))
        heads = (found,) if teacher is None else found
        logits = heads[0] if len(heads) == 1 else jnp.stack(heads).mean(axis=0)
        each = mixing.told(batch, lambda label: task.objective(heads[0], label))
        if teacher is not None:
            said = nnx.merge(teacher, known)(batch["inputs"], rngs=None)
            learned = distillation(heads[-1], jax.lax.stop_gradient(said), distill)
            each = (1 - distill.weight) * each + distill.weight * learned
        for extra in jax.tree.leaves(asked):
            each = each + extra.reshape(extra.shape + (1,) * (each.ndim - 1))
        values = {
            name: mixing.told(batch, lambda label, name=name: task.metrics(logits, label)[name])
            for name in ("loss", "accuracy")
        } | {"objective": each}
        sums = {name: jnp.sum(batch["weight"] * value) for name, value in values.items()}
        return sums["objective"], (take_apart(model)[1], sums)

    return loss


def distillation(
    logits: Float[Array, "*shape C"], teacher: Float[Array, "*shape C"], options: Distill
) -> Float[Array, "*shape"]:
    """What a student's logits miss of a teacher's.

    soft: t^2 KL(softmax(teacher / t) || softmax(logits / t)) (1503.02531, section 2);
    hard: cross-entropy with the teacher's prediction for a label (2012.12877, equation 3).
    """
    if options.kind == "hard":
        label = teacher.argmax(-1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)
    t = options.temperature
    ours, theirs = jax.nn.log_softmax(logits / t), jax.nn.log_softmax(teacher / t)
    return t**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] as [parts, B / parts, ...], each part spread over all devices as the batch is."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
