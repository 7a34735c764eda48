"""Reports and pictures: of a classifier by class, of a model of tokens by position."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix


def per_class(
    outputs: Mapping[str, np.ndarray], labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{class: {"precision", "recall", "f1-score", "support"}}, with "macro avg" and "weighted avg".

    A class without examples, or that is never predicted, scores 0.
    """
    found: Any = classification_report(
        outputs["label"],
        outputs["prediction"],
        labels=range(len(labels)),
        target_names=list(labels),
        output_dict=True,
        zero_division=0,  # type: ignore[arg-type]  # its stub knows strings only
    )
    return {name: scores for name, scores in found.items() if isinstance(scores, dict)}


def draw_confusion(
    outputs: Mapping[str, np.ndarray], labels: Sequence[str], picture: Path, *, title: str
) -> None:
    """Draw how often each class (row) was taken for each class (column) as a PNG.

    Colours are shares of the row; counts are written in up to 30 classes, and above that only
    every so many classes are named.
    """
    count = len(labels)
    matrix = confusion_matrix(outputs["label"], outputs["prediction"], labels=range(count))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.42 * count, 4.5, 14))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    named = range(0, count, -(-count // 50))
    names = [labels[i] if len(labels[i]) <= 16 else labels[i][:15] + "…" for i in named]
    upright = sum(len(name) + 2 for name in names) > 8 * side
    axes.set_xticks(named, names, rotation=90 if upright else 0)
    axes.set_yticks(named, names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if count <= 30:
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                ink = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=ink, fontsize=8)
    figure.savefig(picture, dpi=120)


def draw_positions(outputs: Mapping[str, np.ndarray], picture: Path, *, title: str) -> None:
    """Draw mean loss and accuracy by position in the context as a PNG.

    A loss that falls along the context is what the tokens before are worth. Up to 64 points, each
    the mean over neighbouring positions.
    """
    position = outputs["position"]
    length = int(position.max()) + 1
    bins = min(64, length)
    index = position.astype(np.int64) * bins // length
    counts = np.bincount(index, minlength=bins)
    middle = (np.arange(bins) + 0.5) * length / bins - 0.5
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 2)
    for panel, name in zip(axes, ("loss", "accuracy"), strict=True):
        sums = np.bincount(index, weights=outputs[name], minlength=bins)
        panel.plot(middle[counts > 0], sums[counts > 0] / counts[counts > 0])
        panel.set_xlabel("position in the context")
        panel.set_ylabel("loss (nats)" if name == "loss" else name)
        panel.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def export_predictions(
    outputs: Mapping[str, np.ndarray], labels: Sequence[str], path: Path
) -> None:
    """Write one row per example or token: index, label, prediction (names), probability."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(outputs["label"], outputs["prediction"], outputs["probability"], strict=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "prediction", "probability"])
        for index, (label, prediction, probability) in enumerate(rows):
            writer.writerow([index, labels[label], labels[prediction], f"{probability:.6f}"])
