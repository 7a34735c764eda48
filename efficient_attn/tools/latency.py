"""Seconds of a forward pass of image models, and of timm's PyTorch models where it is installed.

    python -m efficient_attn.tools.latency mobilevit_xs deit_tiny_patch16_224 [--batch 1 16]
        [--attention EXPRESSION] [--turns 5] [--json FILE]
    python -m efficient_attn.tools.latency evit_small --keep_rates 1 0.7 0.5 [--batch 1 16] ...

Both run in this process, in turns, on all cores, float32, evaluation, weights drawn at random; the
best of the turns counts. Ratios of one run mean something, seconds of a shared machine do not. With
`--keep_rates` networks that drop patches run at each of them instead, in turns, and the process's
CPU time stands beside the wall's: other processes take less of it.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
from kernels.compiler import without_ynnpack

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
            for batch in batches:
                images = _images(name, batch)
                runs = [_timed(call, images) for call in (ours, theirs) if call]
                best = np.min([[once()[0] for once in runs] for _ in range(turns)], axis=0).tolist()
                found.append(Latency(name, batch, best[0], best[1] if theirs else None))
                progress.advance(task)
    return found


class Throughput(NamedTuple):
    """A network at a keep rate: seconds of a batch, by the wall and of the process on all cores."""

    name: str
    batch: int
    keep_rate: float
    wall: float
    cpu: float


def throughputs(
    names: Sequence[str],
    batches: Sequence[int],
    rates: Sequence[float],
    *,
    attention: str = backbones.NATIVE,
    turns: int,
) -> list[Throughput]:
    """Every network at every batch size and keep rate.

    Raises:
        UserError: an unknown network, one that drops no patches, a rate outside of (0, 1].
    """
    found = []
    for name in names:
        calls = [_ours(name, attention, {"keep_rate": rate}) for rate in rates]
        for batch in batches:
            images = _images(name, batch)
            runs = [_timed(call, images) for call in calls]
            best = np.min([[once() for once in runs] for _ in range(turns)], axis=0).tolist()
            found += [
                Throughput(name, batch, rate, *seconds)
                for rate, seconds in zip(rates, best, strict=True)
            ]
    return found


def _images(name: str, batch: int) -> np.ndarray:
    side = backbones.VARIANTS[name].image_size
    drawn = np.random.default_rng(0).standard_normal((batch, side, side, 3))
    return drawn.astype(np.float32)


def _timed(
    call: Callable[[np.ndarray], Any], images: np.ndarray
) -> Callable[[], tuple[float, float]]:
    """Runs it once: seconds by the wall, and of the process on all cores."""
    call(images)  # compiles

    def once() -> tuple[float, float]:
        begin = time.perf_counter(), time.process_time()
        call(images)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    return once


def _ours(
    name: str, attention: str, options: Mapping[str, Any] | None = None
) -> Callable[[np.ndarray], Any]:
    graph, state = nnx.split(backbones.create(name, options, attention=attention))
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


def rates_table(found: Sequence[Throughput]) -> str:
    """Images a second, and how many times those of the network's first rate, in Markdown."""
    head = ["network", "batch", "keep rate", "images/s", "times", "images/CPU s", "times"]
    lines = [row(head), row(["---", *["--:"] * (len(head) - 1)])]
    first = {}
    for one in found:
        base = first.setdefault((one.name, one.batch), one)
        cells = [f"`{one.name}`", str(one.batch), f"{one.keep_rate:g}"]
        for mine, its in ((one.wall, base.wall), (one.cpu, base.cpu)):
            cells += [f"{one.batch / mine:.1f}", f"{its / mine:.2f}"]
        lines.append(row(cells))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names, and print the table."""
    parser = argparse.ArgumentParser(prog="latency", description="Seconds of a forward pass.")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--keep_rates", nargs="+", type=float)
    parser.add_argument("--attention", default=backbones.NATIVE)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures as well")
    asked = parser.parse_args(argv[1:])
    require(min(asked.batch) > 0, f"--batch {min(asked.batch)} must be positive")
    how = {"attention": asked.attention, "turns": asked.turns}
    without_ynnpack()
    if asked.keep_rates:
        found = throughputs(asked.names, asked.batch, asked.keep_rates, **how)
        print(rates_table(found))
    else:
        found = measure(asked.names, asked.batch, **how)
        print(table(found))
    if asked.json:
        Path(asked.json).write_text(json.dumps([one._asdict() for one in found], indent=1) + "\n")


if __name__ == "__main__":
    run(main)
