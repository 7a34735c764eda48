"""The picture of a run: loss and accuracy over the steps."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from efficient_attn.train.workdir import read_lines


def draw(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw loss and accuracy of train and validation from a metrics.jsonl as a PNG."""
    lines = read_lines(metrics)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 2)
    for panel, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, marker in (("train", ""), ("validation", "o")):
            key = f"{split}/{name}"
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                panel.plot(steps, values, marker=marker, markersize=3.5, label=split)
        panel.set_xlabel("step")
        panel.set_ylabel("loss (nats)" if name == "loss" else name)
        panel.set_ylim(bottom=0, top=None if name == "loss" else 1.02)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(picture, dpi=130)
