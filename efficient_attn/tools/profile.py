"""Parameters, multiply-adds and activations of image models, beside what was published.

    python -m efficient_attn.tools.profile mobilevit_xs            stage by stage
        [--image_size N] [--attention EXPRESSION] [--num_classes N] [--json]
    python -m efficient_attn.tools.profile --all ['*vit*'] [--plot docs/light_vits.svg]
    python -m efficient_attn.tools.profile --survey                table 3 of arXiv 2404.07236

Nothing is run. Multiply-adds are those of matrix products and convolutions in the jaxpr, scans by
their length, attention's own included. Activations are the most bytes of one image's float32 arrays
alive at once, where nothing is fused.
"""

import argparse
import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import track

from efficient_attn import backbones
from efficient_attn.config import require
from efficient_attn.errors import unknown
from efficient_attn.tools.count import OUTSIDE, by_scope, peak_bytes
from efficient_attn.tools.pareto import draw
from efficient_attn.tools.published import Published, agrees, published, survey
from efficient_attn.tools.table import row
from efficient_attn.train.flags import run
from kernels.target import use

HEADS = ("classifier", "student", "dense", "head", "norm")
"""What stands after the last stage, by the names of a network's modules."""


class Part(NamedTuple):
    """A stage: parameters, multiply-adds and peak bytes of activations of one image."""

    stage: str
    parameters: int
    multiply_adds: int
    peak_bytes: int


class Profile(NamedTuple):
    """A network at an image size, stage by stage."""

    name: str
    image_size: int
    attention: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """All stages: sums, and the largest peak."""
        parameters, adds, peaks = zip(*(part[1:] for part in self.parts), strict=True)
        return Part("all", sum(parameters), sum(adds), max(peaks))


def profile(
    name: str,
    *,
    image_size: int | None = None,
    attention: str = backbones.NATIVE,
    num_classes: int = 1000,
    options: Mapping[str, Any] | None = None,
) -> Profile:
    """The figures of the published network `name`.

    Raises:
        UserError: an unknown name, or what the network cannot be built with.
    """
    if name not in backbones.VARIANTS:
        raise unknown("published network", name, backbones.VARIANTS)
    side = image_size or backbones.VARIANTS[name].image_size

    def make():
        return backbones.create(
            name, options, attention=attention, num_classes=num_classes, image_size=side,
            backend="xla",
        )  # fmt: skip

    graph, state = nnx.split(nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    with use("gpu"):  # convolutions as such, attention by its plain path
        jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    adds, peaks = by_scope(jaxpr), peak_bytes(jaxpr)
    sizes: Counter[str] = Counter()
    for path, variable in nnx.to_flat_state(nnx.filter_state(state, nnx.Param)):
        sizes[_stage(path)] += variable.get_value().size
    adds["head"] = adds.get("head", 0) + adds.pop(OUTSIDE, 0)
    peaks["head"] = max(peaks.get("head", 0), peaks.pop(OUTSIDE, 0))
    parts = [
        Part(stage, sizes[stage], adds.get(stage, 0), peaks.get(stage, 0))
        for stage in sorted({*sizes, *adds}, key=lambda s: (s == "head", s != "stem", s))
    ]
    return Profile(name, side, attention, tuple(parts))


def _stage(path: Sequence[Any]) -> str:
    """The stage that a parameter belongs to."""
    if path[0] == "stages":
        return f"stage{path[1]}"
    if path[0] == "stack":
        return "stage0"
    return "head" if path[0] in HEADS else "stem"


def table(found: Profile) -> str:
    """A network stage by stage, and what was published of it."""
    lines = [row(["stage", "parameters", "multiply-adds", "activations"])]
    lines.append(row(["---", "--:", "--:", "--:"]))
    for part in (*found.parts, found.total):
        adds, peak = f"{part.multiply_adds / 1e6:,.1f} M", f"{part.peak_bytes / 2**20:.2f} MiB"
        lines.append(row([part.stage, f"{part.parameters:,}", adds, peak]))
    told = published().get((found.name, found.image_size))
    if told:
        lines.append("")
        lines.append(
            f"published: {told.params_M or '-'} M parameters, {told.gmacs or '-'} G multiply-adds, "
            f"top-1 {told.top1 or '-'} % ({told.source})"
        )
    return "\n".join(lines)


def compare(pattern: str) -> tuple[str, list[Profile]]:
    """Every network whose name matches, ours beside the published figures, as a Markdown table."""
    head = ["network", "pixels", "parameters", "M published", "multiply-adds G", "published", "%"]
    lines = [row([*head, "top-1"]), row(["---", *["--:"] * len(head)])]
    found, told = [], published()
    names = backbones.names(pattern)
    require(bool(names), f"no published network matches {pattern!r}; try '*vit*'")
    for name in track(names, description="networks"):
        sizes = {size for known, size in told if known == name}
        for side in sorted(sizes | {backbones.VARIANTS[name].image_size}):
            found.append(profile(name, image_size=side))
            lines.append(row(_compared(found[-1], told.get((name, side)))))
    return "\n".join(lines), found


def _compared(ours: Profile, told: Published | None) -> list[str]:
    total = ours.total
    cells = [f"`{ours.name}`", str(ours.image_size), f"{total.parameters:,}"]
    adds = total.multiply_adds / 1e9
    if told is None:
        return [*cells, "", f"{adds:.3f}", "", "", ""]
    same = not told.params_M or agrees(total.parameters / 1e6, told.params_M)
    off = f"{100 * (adds / float(told.gmacs) - 1):+.1f}" if told.gmacs else ""
    printed = told.params_M + " (differs)" * (not same)
    return [*cells, printed, f"{adds:.3f}", told.gmacs, off, told.top1]


def survey_table() -> str:
    """Table 3 of the survey, every row, with ours and what is misprinted beside it."""
    head = ["category", "model", "pixels", "M", "images/s", "G", "top-1", "our M", "our G", "note"]
    lines = [row(head), row(["---"] * 2 + ["--:"] * 7 + ["---"])]
    for line in track(survey(), description="rows"):
        cells, ours = list(line[:7]), ["", ""]
        if line.name in backbones.VARIANTS:
            total = profile(
                line.name, image_size=int(line.our_size), options=_options(line.options)
            ).total
            ours = [f"{total.parameters / 1e6:.2f}", f"{total.multiply_adds / 1e9:.3f}"]
        note = line.corrected or ("" if line.name in backbones.VARIANTS else "not built here")
        lines.append(row([*cells, *ours, note]))
    return "\n".join(lines)


def _options(text: str) -> dict[str, Any]:
    pairs = [option.partition("=") for option in text.split()]
    return {name: ast.literal_eval(value) for name, _, value in pairs}


def main(argv: Sequence[str]) -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="profile", description="What image models cost.")
    parser.add_argument("name", nargs="?", help="a published network; with --all a pattern")
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--attention", default=backbones.NATIVE)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true", help="every network, or those that match")
    parser.add_argument("--plot", help="where --all draws accuracy against cost")
    parser.add_argument("--survey", action="store_true", help="table 3 of arXiv 2404.07236")
    asked = parser.parse_args(argv[1:])
    if asked.survey:
        print(survey_table())
    elif asked.all:
        text, found = compare(asked.name or "*")
        print(text)
        if asked.plot:
            draw(found, asked.plot)
    else:
        require(asked.name is not None, "name a published network, or say --all or --survey")
        made = profile(
            asked.name, image_size=asked.image_size, attention=asked.attention,
            num_classes=asked.num_classes,
        )  # fmt: skip
        print(json.dumps(_plain(made), indent=1) if asked.json else table(made))


def _plain(found: Profile) -> dict[str, Any]:
    parts = [part._asdict() for part in (*found.parts, found.total)]
    return found._asdict() | {"parts": parts}


if __name__ == "__main__":
    run(main)
