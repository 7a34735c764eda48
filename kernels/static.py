"""Pallas kernels compiled ahead of time, for chips that are not here, and what the compilers say.

    python -m kernels.static --target h200|v5e|v6e|tpu7x [--only PATTERN] [--check] [--write]

compiles every case of `kernels.shapes.SHIPPED`, forward with backward (`--passes forward`: alone),
each in a process of its own, and prints for a GPU the registers of each kernel, bytes spilled,
ptxas's warnings, shared memory and wgmma instructions; for a TPU estimated cycles and VMEM.
`--check` fails on a spill, on wgmma that is serialised (warning C7511), and on a figure above
kernels/budget.json; `--write` puts the figures there. The compilers come with pip (Python 3.12 or
newer; no accelerator is needed, or used):

    pip install "jax[cuda13-local]==0.11.2" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm absl-py
    pip install "jax[tpu]==0.11.2"

How to read it. A kernel that sets its warps' registers shows those of its launch, 168 for three
warpgroups. Cycles are the compiler's own static estimate, of one core, without waiting for memory:
they rank variants of a kernel, and are no measurement. Where its estimator gives up, the cycles are
those in which bundles are issued, counted off the listing (12 % below the estimate where there are
both). "outside" is what XLA runs around the Pallas calls, "temporary" the bytes that the program
holds beside its arguments and results. The bound is `shapes.traffic` over the chip's bandwidth.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels import shapes, target
from kernels.compiler_reports import Report, gpu_figures, tpu_figures
from kernels.shapes import Case, Pass

HERE = Path(__file__).parent
BUDGET = HERE / "budget.json"
LEEWAY = {"cycles": 1.02, "issued": 1.02, "outside": 1.02}
"""How far above its budget a figure may be, as a factor; other figures not at all."""
DUMPS_ABORT = "AnalyzeBundles", "Static LLO profiling", "DumpStaticLloProfile"
"""libtpu's estimator aborts the process on some kernels that compile well, or never ends."""
PATIENCE = 75
"""Seconds of a processor for one case: a compiler takes some 30."""


class Chip(NamedTuple):
    """A chip to compile for. topology: as libtpu names it. Published bandwidth and clock."""

    family: target.Chip
    topology: str
    bytes_per_second: float
    hertz: float


CHIPS = {
    "h200": Chip("hopper", "1x1x1", 4.8e12, 1.98e9),
    "v5e": Chip("tpu", "v5e:2x2", 0.819e12, 1.5e9),
    "v6e": Chip("tpu", "v6e:2x2", 1.64e12, 1.75e9),
    "tpu7x": Chip("tpu", "tpu7x:2x2x1", 3.69e12, 1.9e9),  # one of the chip's two cores
}
NEEDS = {
    "hopper": (
        ("jax_cuda13_plugin", "nvidia", "absl"),
        'pip install "jax[cuda13-local]==0.11.2" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm '
        "absl-py",
    ),
    "tpu": (("libtpu",), 'pip install "jax[tpu]==0.11.2"'),
}


def missing(chip: Chip) -> str | None:
    """One sentence where the chip's compiler is not installed, with the remedy."""
    modules, remedy = NEEDS[chip.family]
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"no compiler for {chip.family}: {', '.join(absent)} not installed; {remedy}"


def environment(chip: Chip, folder: Path, *, bundles: bool) -> dict[str, str]:
    """What the compilers read from the environment when they start."""
    if chip.family == "hopper":
        return {
            "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS": "1",
        }  # fmt: skip
    say = f"--xla_jf_dump_static_llo_profile_to={folder}"
    if bundles:
        say = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "LIBTPU_INIT_ARGS": say,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }  # fmt: skip


def compile_for(chip: Chip, case: Case, run: Pass) -> Any:
    """The case compiled by its Pallas path for a chip that is not here.

    Raises:
        NotImplementedError: the op refuses the case.
    """
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if chip.family == "hopper":
        config = (HERE / "targets" / "h200.txtpb").read_text()
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=config, topology=chip.topology
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    place = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with target.use(chip.family), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        avals = list(shapes.arguments(case).values())
        call = shapes.function(case, "pallas")
        if run == "training":
            avals.append(jax.eval_shape(call, *avals))
            call = shapes.gradient(case, "pallas")
        platform = "cuda" if chip.family == "hopper" else "tpu"
        traced = jax.jit(call).trace(*map(place, avals))
        return traced.lower(lowering_platforms=(platform,)).compile()


def _child(chip: Chip, case: Case, run: Pass, folder: Path) -> None:
    """Compile, and leave report.json in the folder that the compiler dumps into."""
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE + 5))
    try:
        compiled = compile_for(chip, case, run)
        gpu = chip.family == "hopper"
        report = gpu_figures(folder) if gpu else tpu_figures(folder, compiled.as_text())
        memory = compiled.memory_analysis()
        if memory is not None:
            report.setdefault("", {})["temporary"] = memory.temp_size_in_bytes
        said = {"kernels": report}
    except NotImplementedError as refusal:
        said = {"refused": str(refusal)}
    (folder / "report.json").write_text(json.dumps(said))


def examine(name: str, case: Case, run: Pass, *, bundles: bool = False) -> dict[str, Any]:
    """{"kernels": Report}, {"refused": why} or {"failed": why} of one case, in a new process."""
    chip = CHIPS[name]
    with tempfile.TemporaryDirectory(prefix="static.") as place:
        folder = Path(place)
        order = ["--target", name, "--child", place, "--only", case.name, "--passes", run]
        done = subprocess.run(
            [sys.executable, "-m", "kernels.static", *order], capture_output=True, text=True,
            env=os.environ | environment(chip, folder, bundles=bundles), errors="replace",
        )  # fmt: skip
        report = folder / "report.json"
        if report.exists():
            return json.loads(report.read_text())
    gave_up = done.returncode == -signal.SIGXCPU or any(s in done.stderr for s in DUMPS_ABORT)
    if gave_up and chip.family == "tpu" and not bundles:
        return examine(name, case, run, bundles=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^\S*(Error|Exception)\b|^RESOURCE", line)]
    return {"failed": (errors or lines or [f"it ended with {done.returncode}"])[-1][:400]}


def complaints(key: str, said: Mapping[str, Any], budget: Mapping[str, Report] | None) -> list[str]:
    """What is wrong with a case, one sentence each; `budget` None has no figures to compare with.

    A spill or serialised wgmma is wrong whatever the budget says.
    """
    if "failed" in said:
        return [f"{key}: {said['failed']}"]
    known = None if budget is None else budget.get(key)
    if "refused" in said:
        return [f"{key}: was compiled before, now refused: {said['refused']}"] if known else []
    wrong = []
    for kernel, figures in said["kernels"].items():
        where = f"{key}: {kernel or 'the program'}"
        if figures.get("spill"):
            wrong.append(f"{where}: {figures['spill']} bytes spilled")
        if "C7511" in figures.get("warnings", ()):
            wrong.append(f"{where}: wgmma is serialised (ptxas C7511)")
        if known is None:
            continue
        for what, most in known.get(kernel, {}).items():
            value = figures.get(what)
            if (
                isinstance(most, int)
                and isinstance(value, int)
                and value > most * LEEWAY.get(what, 1)
            ):
                wrong.append(f"{where}: {what} {value:,d}, the budget is {most:,d}")
    if budget is not None and known is None:
        wrong.append(f"{key}: not in the budget; add it with --write")
    elif known is not None and (new := set(said["kernels"]) ^ set(known)):
        wrong.append(f"{key}: kernels other than in the budget: {', '.join(sorted(new))}")
    return wrong


def lines(chip: Chip, case: Case, run: Pass, said: Mapping[str, Any]) -> list[str]:
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
    parser.add_argument("--target", required=True, choices=CHIPS)
    parser.add_argument("--only", default="", help="cases whose names this pattern is found in")
    parser.add_argument("--passes", nargs="*", default=["training"], choices=shapes.PASSES)
    parser.add_argument("--check", action="store_true", help="fail on a spill or above the budget")
    parser.add_argument("--write", action="store_true", help="put the figures into budget.json")
    parser.add_argument("--jobs", type=int, default=1, help="cases compiled side by side")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    name, chip = options.target, CHIPS[options.target]
    if options.child:
        (case,) = (c for c in shapes.SHIPPED if c.name == options.only)
        _child(chip, case, options.passes[0], Path(options.child))
        return 0
    if why := missing(chip):
        print(why, file=sys.stderr)
        return 2
    version = f"jax {jax.__version__}"
    budget = None if options.write else _budget().get(name, {}).get(version)
    if options.check and budget is None:
        print(f"no figures of {name} with {version} to compare with: spills alone are checked")
    work = [(c, r) for c in shapes.SHIPPED if re.search(options.only, c.name)
            for r in options.passes]  # fmt: skip
    wrong, compiled = [], 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda pair: examine(name, *pair), work)
        for (case, run), said in zip(work, results, strict=True):
            key = f"{case.name}, {run}"
            print("\n".join(lines(chip, case, run, said)), flush=True)
            wrong += complaints(key, said, budget)
            compiled += "kernels" in said
            if options.write and "kernels" in said:
                _keep(name, version, key, said["kernels"])
    if options.check:
        print("\n".join(wrong) or f"{compiled} compiled, nothing to complain of")
    return 1 if options.check and wrong else 0


def _budget() -> dict[str, Any]:
    """Target -> version of jax -> case and pass -> Report."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def _keep(name: str, version: str, key: str, report: Report) -> None:
    kept = _budget()
    kept.setdefault(name, {}).setdefault(version, {})[key] = report
    BUDGET.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
