"""A case compiled for a chip that is not here, in a process of its own, and what comes of it."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels import shapes, target, tuned
from kernels.shapes import Case, Pass
from kernels.static.reports import gpu_figures, tpu_figures

HERE = Path(__file__).parent
DUMPS_ABORT = "AnalyzeBundles", "Static LLO profiling", "DumpStaticLloProfile"
"""libtpu's estimator aborts the process on some kernels that compile well, or never ends."""
COUNTED = ("linear_attention", "gated_linear_attention", "favor_attention", "gated_delta_rule")
"""Ops on whose gradients it never ends, or takes minutes: it is not asked."""
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

    Arrays of heads come and go as [B,T,H*D], as projections write and read them: [B,T,H,D] in jax's
    default layout would be copied first on a TPU.

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
        _flat(x.shape), x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with target.use(chip.family), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        avals = list(shapes.arguments(case).values())
        call = shapes.function(case, "pallas")
        if run == "training":
            avals.append(jax.eval_shape(call, *avals))
            call = shapes.gradient(case, "pallas")

        def program(*arrays):
            made = call(*(x.reshape(a.shape) for x, a in zip(arrays, avals, strict=True)))
            return jax.tree.map(lambda x: x.reshape(_flat(x.shape)), made)

        platform = "cuda" if chip.family == "hopper" else "tpu"
        traced = jax.jit(program).trace(*map(place, avals))
        return traced.lower(lowering_platforms=(platform,)).compile()


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], shape[2] * shape[3]) if len(shape) == 4 else shape


def child(name: str, folder: Path) -> None:
    """Compile what request.json asks for, in the folder that the compiler dumps into.

    Leaves report.json there.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE + 5))
    asked, chip = json.loads((folder / "request.json").read_text()), CHIPS[name]
    try:
        with tuned.use(name, asked["trial"]):
            compiled = compile_for(chip, Case(**asked["case"]), asked["run"])
        gpu = chip.family == "hopper"
        report = gpu_figures(folder) if gpu else tpu_figures(folder, compiled.as_text())
        memory = compiled.memory_analysis()
        if memory is not None:
            report.setdefault("", {})["temporary"] = memory.temp_size_in_bytes
        said = {"kernels": report}
    except NotImplementedError as refusal:
        said = {"refused": str(refusal)}
    (folder / "report.json").write_text(json.dumps(said))


def examine(
    name: str, case: Case, run: Pass, *, trial: tuned.Trial | None = None, bundles: bool = False
) -> dict[str, Any]:
    """{"kernels": Report}, {"refused": why} or {"failed": why} of one case, in a new process.

    trial: sizes in place of the table's. bundles: count them, instead of asking the estimator.
    """
    chip = CHIPS[name]
    bundles |= case.channels or (run == "training" and case.op in COUNTED)
    with tempfile.TemporaryDirectory(prefix="static.") as place:
        folder = Path(place)
        asked = {"case": dataclasses.asdict(case), "run": run, "trial": trial}
        (folder / "request.json").write_text(json.dumps(asked))
        done = subprocess.run(
            [sys.executable, "-m", "kernels.static", "--target", name, "--child", place],
            capture_output=True, text=True,
            env=os.environ | environment(chip, folder, bundles=bundles), errors="replace",
        )  # fmt: skip
        report = folder / "report.json"
        if report.exists():
            said = json.loads(report.read_text())
            found = [x for kernel, x in said.get("kernels", {}).items() if kernel]
            if all(x.get("cycles") != 0 for x in found):
                return said
            return examine(name, case, run, trial=trial, bundles=True)  # it says 0 of long bodies
    gave_up = done.returncode == -signal.SIGXCPU or any(s in done.stderr for s in DUMPS_ABORT)
    if gave_up and chip.family == "tpu" and not bundles:
        return examine(name, case, run, trial=trial, bundles=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^\S*(Error|Exception)\b|^RESOURCE", line)]
    return {"failed": (errors or lines or [f"it ended with {done.returncode}"])[-1][:400]}
