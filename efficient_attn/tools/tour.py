"""Pictures of what mechanisms do, drawn by running them.

    python -m efficient_attn.tools.tour --out=docs/tour [--workdir=runs/tour] [--steps=250]

patterns.png          who sees whom: gradients of each output by each input of one new layer
recurrences.png       the same of what carries a state: how the past fades
estimates.png         a trained attention matrix beside what estimates make of its queries and keys
looks.png             where single pixels of a digit look, exactly and by estimates
projected_keys.png    the keys that a trained Linformer looks at
two_halves.png        a trained LSRA's attention and its convolution, apart

Three small vision transformers are trained for that on scikit-learn's digits, a pixel a token, in a
few minutes on two CPU cores; runs that are in --workdir already are used as they are.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.progress import track

from efficient_attn import data
from efficient_attn.evals.run import restore
from efficient_attn.tools.maps import gradients, influence, mixed, weights
from efficient_attn.train.config import Experiment, resolve
from efficient_attn.train.flags import run
from efficient_attn.train.loop import train
from efficient_attn.train.program import build, complete
from efficient_attn.train.task import score
from efficient_attn.train.workdir import Workdir

LENGTH, SIDE = 64, 8
"""Places of every sequence here, and the side of a picture of as many."""
SEQUENCES = (
    ("softmax", False),
    ("softmax", True),
    ("local(window=16)", False),
    ("local(window=16)", True),
    ("local(window=16, pattern='blocked')", False),
    ("local(window=16, pattern='interleaved')", False),
    ("sparse(pattern='fixed', block=8, summary=2)", True),
    ("sparse(pattern='strided', block=8)", True),
    ("longformer(window=8, tokens=2)", False),
    ("longformer(window=8, dilation=3, dilated=None)", False),
    ("bigbird(block=4, random=1)", False),
    ("reformer(rounds=1, chunk=8)", False),
    ("reformer(rounds=2, chunk=8)", True),
    ("sinkhorn(block=8, temperature=0.05)", False),
    ("linformer(rank=8)", False),
    ("nystrom(landmarks=8, kernel=9)", False),
)
"""Expressions, and whether they are causal."""
PICTURES = (
    "window(window=4)",
    "window(window=4, shift=2)",
    "pool(size=3)",
    "spatial_reduction(ratio=2)",
)
RECURRENCES = (
    "linear",
    "retention",
    "gla",
    "mamba2",
    "gated_delta",
    "bidirectional(mixer=gla)",
    "cosformer",
    "lsra(attention=linear, kernel=7)",
)
ESTIMATES = (
    "performer(features=16)",
    "performer(features=64)",
    "performer(features=256)",
    "performer(features=1024)",
    "nystrom(landmarks=4, kernel=None)",
    "nystrom(landmarks=16, kernel=None)",
    "nystrom(landmarks=32, kernel=None)",
)
BLUES = ListedColormap([(1, 1, 1, 1), *matplotlib.colormaps["Blues"](np.linspace(0.2, 1, 255))])
"""White is 0 and nothing else."""


class Trained(NamedTuple):
    """A model, its accuracy in test, and an image that it has not seen."""

    model: Any
    accuracy: float
    image: np.ndarray

    def inputs(self, layer: int) -> tuple[Any, Any]:
        """The mixer of a layer, and its input [T, E] for the image."""
        block = self.model.stack.blocks[layer]
        spy, block.mixer = block.mixer, Spy(block.mixer)
        self.model(jnp.asarray(self.image)[None])
        seen, block.mixer = block.mixer.seen, spy
        return spy, seen[0]


class Spy:
    """A mixer that keeps what it was given."""

    def __init__(self, mixer: Any):
        self.mixer = mixer
        self.seen: Any = None

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """What the mixer gives."""
        self.seen = x
        return self.mixer(x, context, mask=mask, positions=positions, rngs=rngs, shared=shared)


def learn(expression: str, workdir: Path, steps: int) -> Trained:
    """A vision transformer of two layers on digits, a pixel a token, trained or found in `workdir`.

    Raises:
        UserError: another run is in the directory.
    """
    experiment: Experiment = resolve(
        {
            "attention": expression,
            "model": {
                "name": "vit",
                "patch": 1,
                "width": 32,
                "depth": 2,
                "heads": 2,
                "dropout": 0.0,
            },
            "data": {"batch_size": 32},
            "train": {"steps": steps, "eval_every": steps, "log_every": max(1, steps // 4)},
            "optimizer": {"learning_rate": 3e-3, "warmup": steps // 10, "weight_decay": 0.1},
        }
    )
    result = train(experiment, workdir)
    dataset = data.load(experiment.data)
    program = build(complete(experiment), dataset)
    _, state = restore(Workdir(workdir), program, "last", score(dataset.info))
    image = dataset.splits["test"].gather([0])["inputs"][0]
    return Trained(program.evaluated(state), result["test"]["accuracy"] if result else 0.0, image)


def shade(found: np.ndarray) -> np.ndarray:
    """0 for exactly 0, else 0.2 to 1, by tenths, over three decades of the largest of each row."""
    largest = np.maximum(found.max(axis=-1, keepdims=True), 1e-30)
    decades = np.log10(np.maximum(found / largest, 1e-30))
    return np.where(found == 0, 0.0, np.round(0.2 + 0.8 * np.clip(1 + decades / 3, 0, 1), 1))


def sheet(rows: int, columns: int, *, side: float = 1.9) -> tuple[Figure, Any]:
    """A figure of squares, without ticks."""
    figure = Figure(figsize=(side * columns, (side + 0.3) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for square in axes.flat:
        square.set_xticks([])
        square.set_yticks([])
    return figure, axes


def show(axes: Any, found: np.ndarray, title: str, *, top: float, aspect: float = 1.0) -> None:
    """Numbers from 0 to `top` in even shades."""
    axes.imshow(found, cmap="Blues", vmin=0, vmax=top, interpolation="nearest", aspect=aspect)
    axes.set_title(title, fontsize=7)


def show_shades(axes: Any, found: np.ndarray, title: str) -> None:
    """Gradients by `shade`, and in the title the share of them that are not 0."""
    axes.imshow(shade(found), cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"{title}\n{np.mean(found > 0):.0%}", fontsize=7)


def wrapped(expression: str) -> str:
    """An expression over two or three lines where it has options."""
    text = expression.replace("(", "\n(", 1)
    return text if len(expression) < 30 else text.replace(", ", ",\n", 1)


def patterns() -> Figure:
    """Who sees whom, of every mechanism that leaves something out; pictures in the last row."""
    cases = [(text, causal, None) for text, causal in SEQUENCES]
    cases += [(text, False, (SIDE, SIDE)) for text in PICTURES]
    figure, axes = sheet(-(-len(cases) // 4), 4)
    for square, (text, causal, grid) in zip(
        axes.flat, track(cases, description="patterns"), strict=True
    ):
        found = influence(text, LENGTH, causal=causal, grid=grid)
        about = ", causal" if causal else ""
        show_shades(square, found, wrapped(text) + about)
    return figure


def recurrences() -> Figure:
    """How the past fades where a state carries it."""
    figure, axes = sheet(2, 4)
    for square, text in zip(axes.flat, track(RECURRENCES, description="recurrences"), strict=True):
        causal = not text.startswith("bidirectional")
        show_shades(square, influence(text, LENGTH, causal=causal), wrapped(text))
    return figure


def estimates(trained: Trained) -> Figure:
    """The sharpest head of the last layer, and estimates of its matrix."""
    q, k, exact = _attention(trained)
    head = int(np.argmax(np.max(exact, axis=-1).mean(axis=-1)))
    figure, axes = sheet(2, 4)
    largest = float(np.quantile(exact[head], 0.999))
    show(axes[0, 0], exact[head], "softmax, trained", top=largest)
    for square, text in zip(axes.flat[1:], track(ESTIMATES, description="estimates"), strict=True):
        found = weights(text, q, k)[head]
        error = np.linalg.norm(found - exact[head]) / np.linalg.norm(exact[head])
        show(square, np.maximum(found, 0), f"{wrapped(text)}\nerror {error:.2f}", top=largest)
    return figure


def _attention(trained: Trained) -> tuple[Any, Any, np.ndarray]:
    """Queries and keys [T,H,D] of the last layer for the image, and their matrices [H,T,T]."""
    mixer, x = trained.inputs(-1)
    q, k, _ = (part[0] for part in mixer.project(x[None]))
    return q, k, weights("softmax", q, k)


def looks(trained: Trained) -> Figure:
    """Where three pixels look, in the mean of the last layer's heads."""
    q, k, exact = _attention(trained)
    kinds = (
        "performer(features=64)",
        "performer(features=1024)",
        "nystrom(landmarks=16, kernel=None)",
    )
    found = {"softmax": exact} | {text: weights(text, q, k) for text in kinds}
    places = [(2, 2), (4, 4), (6, 3)]
    figure, axes = sheet(len(places), 1 + len(found), side=1.6)
    for line, (row, column) in zip(axes, places, strict=True):
        line[0].imshow(trained.image[..., 0], cmap="gray_r", interpolation="nearest")
        line[0].plot(column, row, "s", mfc="none", mec="C3", ms=11, mew=2)
        line[0].set_title("the pixel that looks", fontsize=7)
        at = row * SIDE + column
        top = float(exact.mean(axis=0)[at].max())
        for square, (text, each) in zip(line[1:], found.items(), strict=True):
            there = np.maximum(each.mean(axis=0)[at], 0).reshape(SIDE, SIDE)
            show(square, there, wrapped(text), top=top)
    return figure


def projected_keys(trained: Trained) -> Figure:
    """What each projected key is made of, and how much each pixel looks at each."""
    mixer, x = trained.inputs(-1)
    made = np.asarray(mixer.core.keys.weight[...])[0]
    figure, axes = sheet(2, len(made) // 2 + 1, side=1.5)
    bound = float(np.abs(made).max())
    for number, (square, key) in enumerate(zip(axes[:, :-1].flat, made, strict=True)):
        square.imshow(
            key.reshape(SIDE, SIDE), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest"
        )
        square.set_title(f"key {number + 1}", fontsize=7)
    q, k, _ = (part[0] for part in mixer.project(x[None]))
    logits = np.einsum("thd,rs,shd->htr", q, made, k) * k.shape[-1] ** -0.5
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    for square, head in zip(axes[:, -1], shares, strict=False):
        show(square, head, "64 pixels by 8 keys", top=1.0, aspect=len(made) / LENGTH)
    return figure


def two_halves(trained: Trained) -> Figure:
    """The influence of inputs on the attention half's outputs, and on the convolution's."""
    layers = len(trained.model.stack.blocks)
    figure, axes = sheet(layers, 2, side=2.2)
    for layer, line in enumerate(axes):
        mixer, x = trained.inputs(layer)
        half = x.shape[1] // 2
        for square, name, channels in (
            (line[0], "attention", range(half)),
            (line[1], "convolution", range(half, 2 * half)),
        ):
            found = gradients(mixed(mixer, {}), x, channels=channels)
            show_shades(square, found, f"layer {layer + 1}, {name}")
    return figure


def main(argv: Sequence[str]) -> None:
    """Train what is drawn, draw, save."""
    parser = argparse.ArgumentParser(
        prog="tour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/tour"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/tour"))
    parser.add_argument("--steps", type=int, default=250)
    given = parser.parse_args(argv[1:])
    models = {
        name: learn(text, given.workdir / name, given.steps)
        for name, text in (
            ("softmax", "softmax"),
            ("linformer", "linformer(rank=8)"),
            ("lsra", "lsra(kernel=7)"),
        )
    }
    pictures: dict[str, Callable[[], Figure]] = {
        "patterns": patterns,
        "recurrences": recurrences,
        "estimates": lambda: estimates(models["softmax"]),
        "looks": lambda: looks(models["softmax"]),
        "projected_keys": lambda: projected_keys(models["linformer"]),
        "two_halves": lambda: two_halves(models["lsra"]),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw().savefig(given.out / f"{name}.png", dpi=100, pil_kwargs={"optimize": True})
    for name, trained in models.items():
        print(f"{name}: {trained.accuracy:.1%} of the test digits")


if __name__ == "__main__":
    run(main)
