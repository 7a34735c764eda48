"""Pallas kernels compiled ahead of time, for chips that are not here, and what the compilers say.

    python -m kernels.static --target h200|v5e|v6e|tpu7x [--only PATTERN] [--check] [--write]

compiles every case of `kernels.shapes.SHIPPED`, forward with backward (`--passes forward`: alone),
each in a process of its own, and prints for a GPU the registers of each kernel, bytes spilled,
ptxas's warnings, shared memory and wgmma instructions; for a TPU estimated cycles and VMEM.
`--check` fails on a spill, on wgmma that is serialised (warning C7511), and on a figure above
kernels/static/budget.json; `--write` puts the figures there. The compilers come with pip (Python
3.12 or newer; no accelerator is needed, or used):

    pip install "jax[cuda13-local]==0.11.2" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm absl-py
    pip install "jax[tpu]==0.11.2"

How to read it. A kernel that sets its warps' registers shows those of its launch, 168 for three
warpgroups. Cycles are the compiler's own static estimate, of one core, without waiting for memory:
they rank variants of a kernel, and are no measurement. Where its estimator gives up, the cycles are
those in which bundles are issued, counted off the listing, every branch as if it were taken: they
compare with their like alone. "outside" is what XLA runs around the Pallas calls, "temporary" the
bytes that the program holds beside its arguments and results, which are [B,T,H*D]. The bound is
`shapes.traffic` over the chip's bandwidth.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from kernels import shapes
from kernels.shapes import Case, Pass
from kernels.static import ahead, budget


def lines(chip: ahead.Chip, case: Case, run: Pass, said: Mapping[str, Any]) -> list[str]:
    """What is printed of a case: itself and its bound, then one line a kernel."""
    bound = 1e6 * shapes.traffic(case, run) / chip.bytes_per_second
    head = f"{case.name}, {run}: memory bound {bound:,.1f} us"
    for state in ("refused", "failed"):
        if state in said:
            return [head, f"    {state}: {said[state]}"]
    whole = said["kernels"].get("", {})
    for unit in ("cycles", "issued"):
        if unit in whole:
            time = 1e6 * whole[unit] / chip.hertz
            head += f", {unit} {time:,.1f} us ({time / bound:.1f} x)"
    rows = [head]
    for kernel, figures in said["kernels"].items():
        shown = [
            f"{what} {', '.join(value) or 'none'}" if isinstance(value, list)
            else f"{what} {value:,d}" for what, value in figures.items()
        ]  # fmt: skip
        rows.append(f"    {kernel or '(program)':32s} {', '.join(shown)}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, check or write; the exit status: 1 where a check complains, 2 if unable."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kernels.static", description=__doc__, formatter_class=raw)
    parser.add_argument("--target", required=True, choices=ahead.CHIPS)
    parser.add_argument("--only", default="", help="cases whose names this pattern is found in")
    parser.add_argument("--passes", nargs="*", default=["training"], choices=shapes.PASSES)
    parser.add_argument("--check", action="store_true", help="fail on a spill or above the budget")
    parser.add_argument("--write", action="store_true", help="put the figures into budget.json")
    parser.add_argument("--jobs", type=int, default=1, help="cases compiled side by side")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    name, chip = options.target, ahead.CHIPS[options.target]
    if options.child:
        ahead.child(name, Path(options.child))
        return 0
    cases = {case.name: case for case in shapes.SHIPPED}
    chosen = shapes.named(options.only, cases, parser.error)
    work = [(cases[case], run) for case in chosen for run in options.passes]
    if why := ahead.missing(chip):
        print(why, file=sys.stderr)
        return 2
    version = f"jax {jax.__version__}"
    known = None if options.write else budget.read().get(name, {}).get(version)
    if options.check and not options.write and known is None:
        print(f"no figures of {name} with {version} to compare with: spills alone are checked")
    wrong, compiled = [], 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda pair: ahead.examine(name, *pair), work)
        for (case, run), said in zip(work, results, strict=True):
            key = f"{case.name}, {run}"
            print("\n".join(lines(chip, case, run, said)), flush=True)
            wrong += budget.complaints(key, said, known)
            compiled += "kernels" in said
            if options.write and "kernels" in said:
                budget.keep(name, version, key, said["kernels"])
    if options.check:
        print("\n".join(wrong) or f"{compiled} compiled, nothing to complain of")
    return 1 if options.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
