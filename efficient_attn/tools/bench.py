"""A training step by length, mechanism and backend: tokens a second, bytes, multiply-adds.

    python -m efficient_attn.tools.bench softmax linear 'performer(features=64)' \\
        [--model=causal_lm] [--lengths 512 1024 2048] [--backends auto pallas] [--batch=4]
        [--options '{"depth": 4, "width": 256, "heads": 4}'] [--dtype=float32] [--steps=10]
        [--out=results/bench]

The step is train.py's own: forward, backward, AdamW. Bytes are those that XLA's compiler says the
whole step holds, state and batch included, and multiply-adds are counted off the jaxpr, a scan by
its length: both are known before anything is run, and exact. Seconds are the median of single steps
over batches that take turns. What is refused, or does not fit into memory, is a row with the
reason. Writes OUT.csv, row by row, and OUT.png. Batches are of whole sequences without padding.
"""

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track

from efficient_attn.backbones import BACKBONES
from efficient_attn.config import require
from efficient_attn.data import Info
from efficient_attn.errors import UserError, unknown
from efficient_attn.tools.count import by_scope
from efficient_attn.train.config import resolve
from efficient_attn.train.flags import run
from efficient_attn.train.program import compile_for, creator
from efficient_attn.train.result import commit
from kernels.compiler import without_ynnpack

MODEL = {"depth": 4, "width": 256, "heads": 4, "dropout": 0.0}
VOCAB, CLASSES, PATCH = 256, 10, 4
BATCHES = 4
"""Different batches that take turns."""


@dataclass(frozen=True)
class Asked:
    """One row: what is trained, on how much. `options` are those of the model."""

    model: str
    attention: str
    backend: str
    length: int
    batch: int
    dtype: str
    options: dict[str, Any]
    steps: int


@dataclass(frozen=True)
class Row:
    """What came of it; `reason` says why a number is missing."""

    model: str
    attention: str
    backend: str
    length: int
    batch: int
    dtype: str
    parameters: int | None = None
    multiply_adds: int | None = None
    peak_bytes: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    reason: str = ""
    device: str = ""
    jax: str = jax.__version__
    commit: str = ""


def measure(asked: Asked) -> Row:
    """A row, with the reason where something is refused or does not fit."""
    told = {
        name: value for name, value in asdict(asked).items() if name not in ("options", "steps")
    }
    told |= {"device": jax.devices()[0].device_kind, "commit": commit() or ""}
    known: dict[str, Any] = {}
    try:
        _measure(asked, known)
    except (UserError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        known["reason"] = str(error).splitlines()[0][:300]
    return Row(**told, **known)


def _measure(asked: Asked, known: dict[str, Any]) -> None:
    """Fill `known` with what can be known, in the order of what it takes."""
    model = {"name": asked.model} | ({"patch": PATCH} if asked.model == "vit" else {})
    experiment = resolve(
        {
            "model": MODEL | model | asked.options,
            "attention": asked.attention,
            "backend": asked.backend,
            "data": {"batch_size": asked.batch},
            "train": {"dtype": asked.dtype, "eval_batch_size": asked.batch},
        }
    )
    info = describe(asked.model, asked.length)
    program = compile_for(creator(experiment, info), experiment, devices=1)
    known["parameters"] = program.parameters
    batches = [draw(info, asked.batch, seed) for seed in range(BATCHES)]
    traced = program.trace(program.abstract, batches[0])
    known["multiply_adds"] = sum(by_scope(traced.jaxpr).values())
    compiled = traced.lower().compile()
    known["peak_bytes"] = held = _held(compiled.memory_analysis())
    free = _free()
    require(held <= free, f"out of memory: it takes {held:,} bytes, and {free:,} are free")
    seconds = _time(program.init(), compiled, jax.device_put(batches), asked.steps)
    known["step_seconds"] = seconds
    known["tokens_per_second"] = asked.batch * asked.length / seconds


def describe(model: str, length: int) -> Info:
    """The data that a model of `length` positions reads.

    Raises:
        UserError: an unknown model, a length that is no square of patches.
    """
    if model == "vit":
        side = math.isqrt(length)
        require(side**2 == length, f"vit: {length} patches are no square; take 64, 256, 1024, ...")
        labels = tuple(map(str, range(CLASSES)))
        return Info("image", (side * PATCH, side * PATCH, 3), labels, None)
    labels = tuple(map(str, range(CLASSES)))
    known = {
        "encoder": Info("tokens", (length,), labels, VOCAB),
        "dual_encoder": Info("pair", (length,), labels[:2], VOCAB),
        "causal_lm": Info("text", (length,), (), VOCAB),
        "encoder_decoder": Info("translation", (length, length), (), VOCAB),
    }
    if model not in known:
        raise unknown("model", model, BACKBONES)
    return known[model]


def draw(info: Info, size: int, seed: int) -> dict[str, Any]:
    """A batch of random inputs without padding, and random labels."""
    random = np.random.default_rng(seed)

    def ids(*shape: int) -> np.ndarray:
        return random.integers(1, VOCAB, (size, *shape)).astype(np.int32)

    inputs: Any
    if info.kind == "image":
        inputs = random.random((size, *info.shape)).astype(np.float32)
    elif info.kind == "translation":
        inputs = {"source": ids(info.shape[0]), "target": ids(info.shape[1])}
    else:
        inputs = ids(*((2, *info.shape) if info.kind == "pair" else info.shape))
    shape = (size, info.shape[-1]) if info.per_token else (size,)
    label = random.integers(1, info.classes, shape).astype(np.int32)
    return {"inputs": inputs, "label": label, "weight": np.ones(shape, np.float32)}


def _held(analysis: Any) -> int:
    """Arguments, results that are not arguments, and all between."""
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


def _free() -> int:
    """Bytes that the device has left; of a CPU, what the system says is available."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    lines = Path("/proc/meminfo").read_text().splitlines() if os.name == "posix" else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else 2**62


def _time(state: Any, step: Any, batches: Sequence[Any], steps: int) -> float:
    """The median of `steps` steps, after two that do not count."""
    seconds = []
    for batch in itertools.islice(itertools.cycle(batches), steps + 2):
        began = time.perf_counter()
        state, _ = step(state, batch, {})
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def draw_figure(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second, bytes and multiply-adds over the length, a line for each mechanism."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("tokens_per_second", "tokens a second"),
        ("peak_bytes", "bytes that a step holds"),
        ("multiply_adds", "multiply-adds of a step"),
    )
    kinds = dict.fromkeys((row.attention, row.backend) for row in rows)
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for number, kind in enumerate(kinds):
            points = [
                (row.length, getattr(row, name))
                for row in rows
                if (row.attention, row.backend) == kind and getattr(row, name) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=f"C{number % 10}",
                          label=", ".join(kind))  # fmt: skip
        axes.set(xlabel="length", ylabel=label, yscale="log")
        axes.set_xscale("log", base=2)
        lengths = sorted({row.length for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"a training step of {rows[0].model}, {rows[0].device}", fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str]) -> None:
    """Measure row by row, writing each down at once."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attention", nargs="+", help="expressions")
    parser.add_argument("--model", default="causal_lm", help=", ".join(BACKBONES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--options", type=json.loads, default={}, help="of the model, as JSON")
    parser.add_argument("--dtype", default="float32", help="or bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    given = parser.parse_args(argv[1:])
    for name in ("batch", "steps"):
        require(getattr(given, name) > 0, f"--{name}={getattr(given, name)} must be positive")
    describe(given.model, given.lengths[0])
    without_ynnpack()
    asked = [
        Asked(
            given.model, expression, backend, length, given.batch, given.dtype, given.options,
            given.steps,
        )
        for length in given.lengths
        for expression in given.attention
        for backend in given.backends
    ]  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with given.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for one in track(asked, description="steps"):
            rows.append(row := measure(one))
            writer.writerow(asdict(row))
            file.flush()
            speed = (
                f"{row.tokens_per_second:,.0f} tokens/s" if row.tokens_per_second else row.reason
            )
            print(f"{row.attention}, {row.backend}, {row.length}: {speed}", flush=True)
    draw_figure(rows, given.out.with_suffix(".png"))
    print(f"{len(rows)} rows: {given.out.with_suffix('.csv')}, {given.out.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
