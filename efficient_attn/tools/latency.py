"""Seconds of a forward pass of image models, and of timm's PyTorch models where it is installed.

    python -m efficient_attn.tools.latency mobilevit_xs deit_tiny_patch16_224 [--batch 1 16]
        [--attention EXPRESSION] [--turns 5] [--json FILE]

Both run in this process, in turns, on all cores, float32, evaluation, weights drawn at random; the
best of the turns counts. Ratios of one run mean something, seconds of a shared machine do not.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.progress import Progress

from efficient_attn import backbones
from efficient_attn.config import require
from efficient_attn.tools.table import row
from efficient_attn.train.flags import run

DEFINED: list[Any] = []
"""Operators' libraries: they live as long as they are held."""


class Latency(NamedTuple):
    """Seconds of one batch; `theirs` is None where timm is not installed, or lacks the network."""

    name: str
    batch: int
    ours: float
    theirs: float | None


def measure(
    names: Sequence[str], batches: Sequence[int], *, attention: str = backbones.NATIVE, turns: int
) -> list[Latency]:
    """Every network at every batch size.

    Raises:
        UserError: an unknown network.
    """
    found = []
    with Progress() as progress:
        task = progress.add_task("networks", total=len(names) * len(batches))
        for name in names:
            ours, theirs = _ours(name, attention), _timms(name)
            side = backbones.VARIANTS[name].image_size
            for batch in batches:
                images = np.random.default_rng(0).standard_normal((batch, side, side, 3))
                images = images.astype(np.float32)
                runs = [_timed(call, images) for call in (ours, theirs) if call]
                best = np.min([[once() for once in runs] for _ in range(turns)], axis=0).tolist()
                found.append(Latency(name, batch, best[0], best[1] if theirs else None))
                progress.advance(task)
    return found


def _timed(call: Callable[[np.ndarray], Any], images: np.ndarray) -> Callable[[], float]:
    call(images)  # compiles

    def once() -> float:
        begin = time.perf_counter()
        call(images)
        return time.perf_counter() - begin

    return once


def _ours(name: str, attention: str) -> Callable[[np.ndarray], Any]:
    graph, state = nnx.split(backbones.create(name, attention=attention))
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda images: forward(state, images).block_until_ready()


def import_timm() -> tuple[Any, Any]:
    """(timm, torch)."""
    torch = importlib.import_module("torch")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its library is for another PyTorch: two operators are not there
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        DEFINED.append(library)
    return importlib.import_module("timm"), torch


def _timms(name: str) -> Callable[[np.ndarray], Any] | None:
    if importlib.util.find_spec("timm") is None:
        return None
    timm, torch = import_timm()
    if not timm.is_model(name):
        return None
    model = timm.create_model(name).eval()

    def forward(images: np.ndarray):
        with torch.inference_mode():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())

    return forward


def table(found: Sequence[Latency]) -> str:
    """Milliseconds and their ratio, in Markdown."""
    lines = [row(["network", "batch", "ours, ms", "timm, ms", "ours / timm"])]
    lines.append(row(["---", "--:", "--:", "--:", "--:"]))
    for one in found:
        cells = [f"`{one.name}`", str(one.batch), f"{1e3 * one.ours:.1f}"]
        if one.theirs is None:
            cells += ["", ""]
        else:
            cells += [f"{1e3 * one.theirs:.1f}", f"{one.ours / one.theirs:.2f}"]
        lines.append(row(cells))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names, and print the table."""
    parser = argparse.ArgumentParser(prog="latency", description="Seconds of a forward pass.")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--attention", default=backbones.NATIVE)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures as well")
    asked = parser.parse_args(argv[1:])
    require(min(asked.batch) > 0, f"--batch {min(asked.batch)} must be positive")
    found = measure(asked.names, asked.batch, attention=asked.attention, turns=asked.turns)
    print(table(found))
    if asked.json:
        Path(asked.json).write_text(json.dumps([one._asdict() for one in found], indent=1) + "\n")


if __name__ == "__main__":
    run(main)
