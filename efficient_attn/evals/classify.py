"""Metrics of a classifier on a split: the one way there, for training and for eval.py."""

from collections.abc import Mapping

import jax
import numpy as np

from efficient_attn.data import Source
from efficient_attn.data.loader import eval_batches
from efficient_attn.train.program import Program, State


def predict(
    program: Program, state: State, source: Source, *, batch_size: int, limit: int | None = None
) -> dict[str, np.ndarray]:
    """What the model says of the first `limit` examples (all by default), in order.

    Returns "label", "prediction", "probability" (of the prediction), "loss" and "accuracy" (0 or
    1), each [N]. The rows that fill up the last batch are left out.
    """
    parts = []
    for batch in eval_batches(source, batch_size=batch_size, limit=limit):
        outputs = jax.device_get(program.predict(state, batch)) | {"label": batch["label"]}
        real = batch["weight"] > 0
        parts.append({name: values[real] for name, values in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarize(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean "accuracy" and "loss" (nats), summed in float64."""
    return {
        name: float(np.sum(outputs[name], dtype=np.float64) / len(outputs[name]))
        for name in ("accuracy", "loss")
    }


def evaluate(
    program: Program, state: State, source: Source, *, batch_size: int, limit: int | None = None
) -> dict[str, float]:
    """Accuracy and loss; the batch size changes them by rounding at most."""
    return summarize(predict(program, state, source, batch_size=batch_size, limit=limit))
