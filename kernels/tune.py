"""The sizes of the kernels' blocks that are the fastest on a chip: makes kernels/tuned.json.

    python -m kernels.tune --target v6e|v5e|tpu7x|h200 [--only PATTERN] [--measure]

goes over the kernels of `SEARCHES`. For each it starts at the rule of the kernel's plan, and takes
one size after the other through its candidates, keeping the best; a candidate that does not compile
is none. What is best has the least sum of log times over the cases, forward and with backward.

With --measure the times are measured on the chip, which must be jax's first device; each result is
compared with XLA's first. Without it, a TPU's are the static estimates of `kernels.static`, ahead
of time: they do not see waits for memory. A GPU has no such estimate, and its rule is written down
as "designed".
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kernels import shapes, tuned
from kernels.bench.device_time import timer
from kernels.bench.run import inputs, measure, truth
from kernels.shapes import Case
from kernels.static import ahead

Sizes = dict[str, int]
Seconds = dict[str, float]
"""By case and pass."""
Cost = Callable[[Case, tuned.Trial], Seconds]
DESIGNED = "designed, unmeasured"
GAIN = 0.99
"""What sizes are better by than others, as a factor: less is noise."""


class Search(NamedTuple):
    """What to try for a kernel. cases: names in `shapes.SHIPPED`."""

    cases: tuple[str, ...]
    candidates: Mapping[str, tuple[int, ...]]


def _linear(sizes: str, *ops: str, beside: bool = False) -> Search:
    candidates = {"chunk": (256, 512), "parts": (1, 2)} | ({"beside": (1, 2)} if beside else {})
    return Search(tuple(f"{op} causal B1 T8192 H4 {sizes} bfloat16" for op in ops), candidates)


def _window(dim: int) -> Search:
    candidates = {"queries": (256, 1024), "edge": (128, 256)}
    return Search((f"window_attention causal B1 T8192 H4 D{dim} W512 bfloat16",), candidates)


def _resident(dim: int) -> Search:
    candidates = {"queries": (512, 1024), "rows": (256, 512, 1024)}
    return Search((f"linformer_attention B1 T8192 H4 D{dim} R256 bfloat16",), candidates)


def _hopper(dim: int) -> Search:
    dense = f"softmax_attention causal B1 T4096 H4 D{dim} bfloat16"
    candidates = {"keys": (64, 128), "stages": (2, 3, 4), "dq": (64, 128), "dkv": (64, 128)}
    return Search((dense, *_window(dim).cases), candidates)


PLAIN = "linear_attention", "gated_linear_attention"
TPU = {
    "linear R64 D64": _linear("D64", *PLAIN),
    "linear R128 D128": _linear("D128", *PLAIN, beside=True),
    "linear R256 D64": _linear("D64 R256", "favor_attention"),
    "linear R256 D128": _linear("D128 R256", "favor_attention"),
    "softmax window 512 D64": _window(64),
    "softmax window 512 D128": _window(128),
    "softmax resident D64": _resident(64),
    "softmax resident D128": _resident(128),
}
SEARCHES = {"tpu": TPU, "hopper": {f"softmax D{dim}": _hopper(dim) for dim in (64, 128)}}


class Estimates:
    """Static estimates of a chip that is not here."""

    def __init__(self, chip: str):
        self.chip = chip
        self.units: dict[str, str] = {}

    def __call__(self, case: Case, trial: tuned.Trial) -> Seconds:
        """Raises NotImplementedError where the sizes do not compile, or have no like estimate."""
        seconds = {}
        for run in shapes.PASSES:
            key = f"{case.name}, {run}"
            count = self.units.get(key) == "issued"
            said = ahead.examine(self.chip, case, run, trial=trial, bundles=count)
            if "kernels" not in said:
                raise NotImplementedError(next(iter(said.values())))
            whole = said["kernels"][""]
            unit = self.units.setdefault(key, "issued" if "issued" in whole else "cycles")
            if unit not in whole:
                raise NotImplementedError(f"{key}: estimated otherwise than the rule")
            seconds[key] = whole[unit] / ahead.CHIPS[self.chip].hertz
        return seconds


class Times:
    """Times on the chip at hand, of what agrees with XLA."""

    def __init__(self):
        self.clock = timer()
        self.given: dict[str, Any] = {}

    def __call__(self, case: Case, trial: tuned.Trial) -> Seconds:
        """Raises NotImplementedError where the sizes do not compile, or give other results."""
        if case.name not in self.given:
            given = inputs(case)
            self.given = {case.name: (given, truth(case, given[0]))}
        jax.clear_caches()
        with tuned.use(None, trial):
            given, expected = self.given[case.name]
            rows = measure("pallas", case, given, expected, self.clock)
        if "skipped" in rows[0]:
            raise NotImplementedError(rows[0]["skipped"])
        return {f"{case.name}, {row['pass']}": row["ms"] / 1e3 for row in rows}


def rule(kernel: str) -> Sizes:
    """The sizes that the kernel's plan has of its own."""
    dim = int(kernel.rpartition("D")[2])
    with tuned.use(None):
        if linear := re.match(r"linear R(\d+)", kernel):
            from kernels.pallas_tpu.linear_plan import sizes_of

            return sizes_of(int(linear[1]), dim)._asdict()
        if kernel.count(" ") == 1:
            from kernels.pallas_gpu.softmax import TABLE

            return TABLE[dim]._asdict()
        from kernels.pallas_tpu.softmax_plan import Sizes as OfSoftmax

        return OfSoftmax()._asdict()


def best(kernel: str, search: Search, cost: Cost) -> tuple[Sizes, Seconds, Seconds]:
    """The best sizes, their seconds, and those of the rule."""

    def total(seconds: Seconds) -> float:
        return sum(map(math.log, seconds.values()))

    def seconds_of(sizes: Sizes) -> Seconds:
        seconds: Seconds = {}
        for case in shapes.SHIPPED:
            if case.name in search.cases:
                seconds |= cost(case, {kernel: sizes})
        said = ", ".join(f"{1e6 * x:,.1f} us" for x in seconds.values())
        print(f"{kernel}: {sizes}: {said}", flush=True)
        return seconds

    own = rule(kernel)
    chosen = {name: own[name] for name in search.candidates}
    first = least = seconds_of(chosen)
    for name, values in search.candidates.items():
        for value in values:
            if value == chosen[name]:
                continue
            try:
                seconds = seconds_of(chosen | {name: value})
            except NotImplementedError as why:
                print(f"{kernel}: {name} {value}: {why}", flush=True)
                continue
            if total(seconds) < total(least) + len(least) * math.log(GAIN):
                chosen, least = chosen | {name: value}, seconds
    return chosen, least, first


def main(argv: Sequence[str] | None = None) -> int:
    """Search, print and write; the exit status, 2 where there is neither chip nor compiler."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kernels.tune", description=__doc__, formatter_class=raw)
    parser.add_argument("--target", required=True, choices=ahead.CHIPS)
    parser.add_argument("--only", default="", help="kernels whose names this pattern is found in")
    parser.add_argument("--measure", action="store_true", help="by time, on the chip at hand")
    options = parser.parse_args(argv)
    name, chip = options.target, ahead.CHIPS[options.target]
    if options.measure and tuned.chip() != name:
        print(f"the chip at hand is {jax.devices()[0].device_kind}, no {name}", file=sys.stderr)
        return 2
    known = SEARCHES[chip.family]
    searches = {name: known[name] for name in shapes.named(options.only, known, parser.error)}
    if chip.family == "hopper" and not options.measure:
        for kernel, search in searches.items():
            own = rule(kernel)
            keep(name, kernel, {"sizes": {n: own[n] for n in search.candidates}, "how": DESIGNED})
        return 0
    if not options.measure and (why := ahead.missing(chip)):
        print(why, file=sys.stderr)
        return 2
    cost, how = (Times(), "measured") if options.measure else (Estimates(name), "estimated")
    for kernel, search in searches.items():
        sizes, least, first = best(kernel, search, cost)
        keep(name, kernel, {
            "sizes": sizes, "how": how, "jax": jax.__version__,
            "microseconds": _microseconds(least), "by the rule": _microseconds(first),
        })  # fmt: skip
    return 0


def _microseconds(seconds: Seconds) -> dict[str, float]:
    return {key: round(1e6 * x, 1) for key, x in seconds.items()}


def keep(chip: str, kernel: str, entry: Mapping[str, Any]) -> None:
    """Put an entry into the table."""
    kept = json.loads(tuned.TABLE.read_text()) if tuned.TABLE.exists() else {}
    kept.setdefault(chip, {})[kernel] = dict(entry)
    tuned.TABLE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    tuned.table.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
