"""Every op checked, then timed, against XLA, cuDNN, tokamax, jax-linear-attention and fla.

    python -m kernels.bench [--ops PATTERN] [--out DIR] [--minutes 9] [--quick] [--prove]
    python -m kernels.bench --cpu-peers [--out DIR]      see `kernels.bench.peers`

The cases are `kernels.shapes.MEASURED`; --quick takes one small case an op, which a CPU can. Each
implementation is compared with XLA in float32 first, output and gradients: where one is further off
than `run.TOLERANCES`, no time is reported. Times are the device's where its profiler gives them,
else those of calls enqueued between two blocking points; each row says which. Calls take turns on
copies of the inputs that together outgrow the cache; the median over batches of calls counts. Rates
are `shapes.work` and `shapes.traffic` over that time; the bound is the least time that the ceilings
leave, a copy's and a matrix product's rates, measured first.

Results go to DIR/bench-DEVICE-COMMIT.json as they come, and to a picture beside it. Run again, it
goes on where it stopped. What was skipped is in the file with the reason. With --prove, the ops
whose kernels were right and faster than XLA in every case go into kernels/proven.json, where
backend="auto" finds them on such a device; of the others it says why not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from kernels import shapes
from kernels.bench import peers
from kernels.bench.proof import prove
from kernels.bench.run import run
from kernels.compiler import without_ynnpack


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 when nothing is left to do, 3 when time ran out before."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kernels.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--ops", default="", help="cases whose names this pattern is found in")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop")
    parser.add_argument(
        "--quick", action="store_true", help="one small case an op; with --cpu-peers, one length"
    )
    parser.add_argument("--prove", action="store_true", help="tell backend='auto' what was found")
    parser.add_argument("--cpu-peers", action="store_true", help="the PyTorch peers, on this CPU")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cpu_peers:
        without_ynnpack()
        return peers.main(options.out, quick=options.quick)
    if jax.devices()[0].platform == "cpu" and not options.quick:
        parser.error("the full list needs an accelerator; on a CPU take --quick or --cpu-peers")
    cases = {case.name: case for case in (shapes.QUICK if options.quick else shapes.MEASURED)}
    cases = [cases[name] for name in shapes.named(options.ops, cases, parser.error)]
    left, kept = run(cases, options.out, options.minutes)
    if options.prove:
        prove({case.op for case in cases}, kept)
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
