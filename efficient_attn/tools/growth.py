"""How work and memory grow with the length, for every mechanism: exponents, table and picture.

    python -m efficient_attn.tools.growth README.md docs/growth.svg

Multiply-adds are counted off the jaxpr, a scan by its length. Peak memory is what XLA's compiler
says that it will hold beside inputs and outputs. Neither runs anything, and both are of what
`auto` takes on one CPU, so they are exact and the same everywhere. An exponent is the slope of a
straight line through the logarithms.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.attention.base import nearly_square
from efficient_attn.config import require
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.count import multiply_adds
from efficient_attn.tools.table import between, read, row
from efficient_attn.train.flags import run
from kernels import Mask
from kernels.target import use

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS = 256, 4
EXPRESSIONS = (
    "softmax",
    "linformer(rank=256)",
    "performer(features=256)",
    "linear",
    "cosformer",
    "nystrom",
    "local",
    "sparse",
    "longformer",
    "bigbird",
    "reformer",
    "sinkhorn",
    "synthesizer",
    "lsra(attention=linear)",
    "retention",
    "gla",
    "mamba2",
    "gated_delta",
    "bidirectional(mixer=gla)",
    "pool",
    "window",
    "spatial_reduction(reduction='pool')",
    "relu_linear",
    "separable",
)
"""Every mechanism, with options that follow the length only where its paper says so.

What works on pictures alone has one of as many places, twice as wide as high or square.
"""
LEFT_OUT = {"biased": "its number of the offset of each pair of places alone takes T^2 integers"}
"""Those that cannot be measured at such lengths, and why."""


@dataclass(frozen=True)
class Growth:
    """One mechanism over `lengths`; bytes are those of the forward pass and of a training step."""

    expression: str
    causal: bool
    lengths: tuple[int, ...]
    claimed: tuple[int, ...]
    counted: tuple[int, ...]
    forward_bytes: tuple[int, ...]
    training_bytes: tuple[int, ...]


def exponent(lengths: Sequence[int] | np.ndarray, values: Sequence[int] | np.ndarray) -> float:
    """The p of the T^p that fits best, by least squares on the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(np.maximum(values, 1)), 1)[0])


def measure(expression: str, lengths: Sequence[int] = LENGTHS) -> Growth:
    """One layer of `expression`, causal where it can be, at each of `lengths`, batch 1, float32."""
    (choice,) = attention.pattern(expression, 1)
    causal = "causal" in choice.mechanism.capabilities(choice.config)
    claimed, counted, held, trained = [], [], [], []
    for length in lengths:
        site = _site(choice, length)
        forward, training, arrays = _functions(choice, site, causal)
        claimed.append(attention.cost(choice, site, length).multiply_adds)
        counted.append(multiply_adds(forward, *arrays))
        held.append(_peak(forward, arrays))
        trained.append(_peak(training, arrays))
    columns = (tuple(c) for c in (lengths, claimed, counted, held, trained))
    return Growth(expression, causal, *columns)


def count(expression: str, lengths: Sequence[int] = LENGTHS) -> tuple[int, ...]:
    """The multiply-adds of `measure` alone, which need no compiler."""
    (choice,) = attention.pattern(expression, 1)
    causal = "causal" in choice.mechanism.capabilities(choice.config)
    sites = [_site(choice, length) for length in lengths]
    return tuple(
        multiply_adds(forward, *arrays)
        for forward, _, arrays in (_functions(choice, site, causal) for site in sites)
    )


def _site(choice, length: int) -> Site:
    grid = nearly_square(length) if choice.mechanism.on_grids else None
    return Site(width=WIDTH, heads=HEADS, seq=length, grid=grid)


def _functions(choice, site: Site, causal: bool):
    """(forward, gradient of its sum by all parameters and x, abstract arguments)."""
    shared: dict[str, nnx.Module] = {}

    def make():
        mixer = attention.build(choice, site, needs=(), rngs=make_rngs(0), shared=shared)
        return mixer, nnx.Dict(shared)

    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def forward(params, rest, x):
        mixer, shared = nnx.merge(graph, params, rest)
        with use("cpu"):
            return mixer(x, mask=Mask(causal=causal), shared=shared)

    def training(params, rest, x):
        loss = lambda params, x: jnp.sum(forward(params, rest, x))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(params, x)

    x = jax.ShapeDtypeStruct((1, site.seq, site.width), jnp.float32)
    return forward, training, (params, rest, x)


def _peak(function, arrays) -> int:
    analysis = jax.jit(function).lower(*arrays).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def render(rows: Sequence[Growth]) -> str:
    """The table in Markdown: exponents, and the figures at the greatest length."""
    longest = f"{rows[0].lengths[-1]:,}"
    lines = [
        row(["mechanism", "T^p claimed", "counted", "memory, forward", "memory, training",
             f"multiply-adds at {longest}", f"MiB at {longest}, forward (training)"]),
        row(["---"] + [":-:"] * 4 + ["--:"] * 2),
    ]  # fmt: skip
    for g in rows:
        fits = [f"{exponent(g.lengths, y):.2f}" for y in
                (g.claimed, g.counted, g.forward_bytes, g.training_bytes)]  # fmt: skip
        memory = f"{g.forward_bytes[-1] / 2**20:,.0f} ({g.training_bytes[-1] / 2**20:,.0f})"
        lines.append(row([f"`{g.expression}`", *fits, f"{g.counted[-1] / 1e9:,.1f} G", memory]))
    return "\n".join(lines)


def draw(rows: Sequence[Growth], picture: Path) -> None:
    """Multiply-adds and memory of a training step over the length, both axes logarithmic."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    styles = itertools.product(("-", "--", ":", "-."), range(10))
    for g, (line, color) in zip(rows, itertools.islice(styles, len(rows)), strict=True):
        look = {"color": f"C{color}", "linestyle": line, "marker": ".", "label": g.expression}
        left.plot(g.lengths, g.counted, **look)
        right.plot(g.lengths, [b / 2**20 for b in g.training_bytes], **look)
    for axes, what in ((left, "multiply-adds, forward"), (right, "MiB held, training step")):
        axes.set(xscale="log", yscale="log", xlabel="length T", ylabel=what)
        axes.set_xticks(LENGTHS, [f"{t:,}" for t in LENGTHS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    how = {"loc": "outside right center", "fontsize": 8, "handlelength": 3}
    figure.legend(*left.get_legend_handles_labels(), **how)
    figure.suptitle(f"One layer, width {WIDTH}, {HEADS} heads, batch 1, float32")
    figure.savefig(picture)


def main(argv: Sequence[str]) -> None:
    """Measure everything; rewrite the table of a README and a picture.

    Raises:
        UserError: not two files; no README to rewrite, or no place in it.
    """
    require(len(argv) == 3, "say which two files to write, for example README.md docs/growth.svg")
    readme, picture = map(Path, argv[1:])
    between(read(readme), "growth", "")  # before minutes of compiling
    require(picture.parent.is_dir(), f"there is no directory {str(picture.parent)!r}; make it")
    rows = [measure(text) for text in track(EXPRESSIONS, description="mechanisms")]
    readme.write_text(between(read(readme), "growth", render(rows)))
    draw(rows, picture)


if __name__ == "__main__":
    run(main)
