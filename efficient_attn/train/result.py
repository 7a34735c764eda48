"""What a run says of itself: the line at its start, and where its result comes from."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import flax
import jax

from efficient_attn.data import Dataset
from efficient_attn.train.config import Experiment, fingerprint, to_dict
from efficient_attn.train.program import Program


def describe(experiment: Experiment, program: Program, dataset: Dataset) -> str:
    """What is trained, on what, in one line."""
    sizes = ", ".join(f"{len(source)} {name}" for name, source in dataset.splits.items())
    device = jax.local_devices()[0]
    return (
        f"{experiment.model['name']} with {experiment.attention} attention, "
        f"{program.parameters:,} parameters; {experiment.data.name}: {sizes}; "
        f"{program.mesh.size} x {device.device_kind}, {experiment.train.dtype}"
    )


def provenance(experiment: Experiment, program: Program) -> dict[str, Any]:
    """What a number in a table needs beside it to be found again."""
    return {
        "attention": experiment.attention,
        "seed": experiment.seed,
        "parameters": program.parameters,
        "config_hash": fingerprint(to_dict(experiment)),
        "commit": commit(),
        "versions": versions() | {"devices": program.mesh.size},
    }


def versions() -> dict[str, Any]:
    """What ran it: Python, jax, flax, and the devices."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
    }


def commit() -> str | None:
    """The git commit of this code, "+changes" when files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
