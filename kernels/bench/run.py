"""What `python -m kernels.bench` does: each implementation of a case checked, then timed."""

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels import shapes
from kernels.bench import picture, rivals
from kernels.bench.device_time import Timer, timer
from kernels.shapes import Case

OURS = "pallas", "xla"
TOLERANCES = {"bfloat16": (5e-3, 1e-2), "float16": (2e-3, 4e-3), "float32": (1e-4, 2e-4)}
"""Relative root mean square errors of outputs and of each gradient."""
CACHE = 128 << 20
"""Inputs that take turns are at least so many bytes together: an H200's L2 is 50 MiB."""
ROOM = 24 << 30
TOO_LONG = 2e14
"""Operations above which XLA's attention, which writes its logits, is not waited for."""
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what a time depends on."""
    names = ("jax", "jaxlib", "libtpu", "tokamax", "jax-linear-attention", "torch", "triton",
             "flash-linear-attention", "nvidia-cudnn-cu13")  # fmt: skip
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The short hash of the checkout this file is in, "+" where it has changes; "" without git."""
    here = Path(__file__).parent
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--short", "."))
    except OSError:
        return ""


def relative(got: Any, expected: Any) -> float:
    """|got - expected| / |expected| in the 2-norm."""
    got, expected = (jnp.asarray(x).astype(jnp.float32) for x in (got, expected))
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def truth(case: Case, given: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """(out, gradients) by XLA, float32 and its products exact to it."""
    wide = dataclasses.replace(case, dtype="float32")
    arrays = [x.astype(jnp.float32) if x.dtype == case.dtype else x for x in given]
    with jax.default_matmul_precision("highest"):
        return jax.jit(shapes.gradient(wide, "xla"))(*arrays)


def wrong(case: Case, got: Sequence[Any], expected: Sequence[Any]) -> tuple[str | None, Row]:
    """(what is off by more than it may be, or None; the errors)."""
    forward, backward = TOLERANCES[case.dtype]
    errors = [relative(g, e) for g, e in zip(got, expected, strict=True)]
    row = {"error_forward": errors[0], "error_gradients": max(errors[1:])}
    if not errors[0] <= forward:
        return f"wrong: output off by {errors[0]:.1e}, allowed {forward:.0e}", row
    if not row["error_gradients"] <= backward:
        return f"wrong: gradient off by {row['error_gradients']:.1e}, allowed {backward:.0e}", row
    return None, row


def inputs(case: Case) -> list[tuple[jax.Array, ...]]:
    """Copies of the arrays and of a cotangent, other numbers in each."""
    out = jax.eval_shape(shapes.function(case, "xla"), *shapes.arguments(case).values())
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.arguments(case).values())
    copies = max(1, min(8, 1 + CACHE // size, ROOM // size))
    made = []
    for seed in range(copies):
        cotangent = jax.random.normal(jax.random.key(99 + seed), out.shape).astype(out.dtype)
        made.append((*shapes.draw(case, seed).values(), cotangent))
    return made


def candidate(name: str, case: Case) -> tuple[Callable[..., Any], Callable[..., Any], bool]:
    """(forward, forward and backward, whether in torch) of an implementation by its name.

    Raises:
        NotImplementedError: it does not take the case, or is not here.
    """
    if name in OURS:
        work = shapes.work(case, "training")
        if name == "xla" and case.op == "softmax_attention" and work > TOO_LONG:
            raise NotImplementedError("writes its logits: would take too long")
        return shapes.function(case, name), shapes.gradient(case, name), False
    rival = rivals.RIVALS[name]
    call = rival.make(case)
    if rival.torch:
        return call, rivals.torch_gradient(call, case), True
    return call, shapes.differentiated(case, call), False


def measure(name: str, case: Case, given, expected, clock: Timer) -> list[Row]:
    """The rows of one implementation of one case: forward and training, or why there is none."""
    head = {"case": case.name, "by": name}
    try:
        forward, training, torch = candidate(name, case)
        sets = {"training": given, "forward": [arrays[:-1] for arrays in given]}
        if torch:
            sets = {r: [tuple(map(rivals.to_torch, x)) for x in s] for r, s in sets.items()}
        calls, held = {"forward": forward, "training": training}, {}
        if not torch:
            calls = {r: jax.jit(c).lower(*sets[r][0]).compile() for r, c in calls.items()}
            held = {r: c.memory_analysis() for r, c in calls.items()}
        got = calls["training"](*sets["training"][0])
        got = [rivals.from_torch(x) for x in got] if torch else got
        reason, errors = wrong(case, got, expected)
        if reason:
            return [head | errors | {"skipped": reason}]
        rows = []
        for run in shapes.PASSES:
            row = head | {"pass": run} | errors | clock(calls[run], sets[run], torch=torch)
            if (memory := held.get(run)) is not None:
                row["temporary_bytes"] = memory.temp_size_in_bytes
            rows.append(row)
        return rows
    except Exception as error:  # one implementation that fails must not end the others
        text = str(error).strip().split("\n")[0][:300]
        if isinstance(error, NotImplementedError):
            return [head | {"skipped": text, "refused": True}]
        return [head | {"skipped": f"{type(error).__name__}: {text}"}]


def rated(case: Case, row: Row, ceilings: Row) -> Row:
    """The row with what it achieves, and how near that is to what the ceilings allow."""
    if "ms" not in row:
        return row
    seconds, run = row["ms"] / 1e3, row["pass"]
    bound = shapes.roofline(case, run, **ceilings)
    return row | {
        "bytes_per_second": shapes.traffic(case, run) / seconds,
        "flops_per_second": shapes.work(case, run) / seconds,
        "bound_ms": 1e3 * bound,
        "of_bound": bound / seconds,
    }


def ceilings(clock: Timer) -> Row:
    """Bytes a second of a copy, and operations a second of a product of large matrices."""
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype, size = (jnp.float32, 1024) if on_cpu else (jnp.bfloat16, 8192)
    count = 1 << (24 if on_cpu else 29)
    given = [(jnp.full(count, i, dtype),) for i in range(2)]
    copied = clock(jax.jit(lambda x: x + 1), given, torch=False)
    pair = [(jnp.full((size, size), 0.5 + i, dtype),) for i in range(2)]
    multiplied = clock(jax.jit(lambda x: x @ x), pair, torch=False)
    moved = 2 * count * jnp.dtype(dtype).itemsize
    return {
        "bytes_per_second": moved / copied["low"] * 1e3,
        "flops_per_second": 2 * size**3 / multiplied["low"] * 1e3,
    }


def line(row: Row) -> str:
    """A row for a terminal."""
    head = f"{row['case']:58s} {row.get('pass', ''):9s} {row['by']:8s}"
    if "skipped" in row:
        return f"{head} {row['skipped']}"
    return f"{head} {row['ms']:10.3f} ms {_rates(row)} {100 * row['of_bound']:4.0f} % of the bound"


def _rates(row: Row) -> str:
    moved, worked = row["bytes_per_second"] / 1e9, row["flops_per_second"] / 1e9
    return f"{moved:8,.1f} GB/s {worked:10,.1f} GFLOP/s"


def started(folder: Path, clock: Timer) -> tuple[Path, Row]:
    """The file of this device, commit and versions, and what is in it already."""
    device = jax.devices()[0].device_kind
    name = "-".join(re.sub(r"\W+", "_", part) for part in (device, commit().replace("+", "_new")))
    path = folder / f"bench-{name}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["versions"] == versions() and not commit().endswith("+"):
            return path, kept
    kept = {"device": device, "versions": versions(), "commit": commit(), "timer": clock.how,
            "ceilings": ceilings(clock), "rows": []}  # fmt: skip
    return path, kept


def run(cases: Sequence[Case], folder: Path, minutes: float) -> tuple[int, Row]:
    """Check, time, print and write; how many (case, implementation) pairs are left, and the file's
    content."""
    end, clock = time.monotonic() + 60 * minutes, timer()
    path, kept = started(folder, clock)
    print(f"{kept['device']}, {kept['versions']}, commit {kept['commit']}; time: {kept['timer']}")
    print(f"ceilings, by a copy and a matrix product: {_rates(kept['ceilings'])}", flush=True)
    done = {(row["case"], row["by"]) for row in kept["rows"]}
    todo = [(c, n) for c in cases for n in (*OURS, *rivals.of(c)) if (c.name, n) not in done]
    before: Case | None = None
    given, expected = [], ()
    while todo and time.monotonic() < end:
        case, name = todo.pop(0)
        if case != before:
            given, expected = [], ()  # let go of the last case's memory first
            given = inputs(case)
            expected, before = truth(case, given[0]), case
        for row in measure(name, case, given, expected, clock):
            kept["rows"].append(rated(case, row, kept["ceilings"]))
            print(line(kept["rows"][-1]), flush=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{path}" + (f"; {len(todo)} left, run again to go on" if todo else ""))
    try:
        picture.draw(kept, path.with_suffix(".png"))
    except NotImplementedError as why:
        print(f"no picture: {why}")
    return len(todo), kept
