"""How a run is compiled, and kept on disk: its second start, or that of a row, compiles nothing."""

import contextlib
import hashlib
import os
from pathlib import Path

import filelock
import jax

from kernels.compiler import without_ynnpack

LEAST = 0.2  # seconds that compiling took, for its result to be kept
MOST = 4 * 2**30  # bytes kept; what was not used for the longest time goes first


def prepare() -> None:
    """What a program that runs models does before anything is compiled."""
    without_ynnpack()
    keep_compiled()


def keep_compiled() -> None:
    """Have jax keep what it compiles in ~/.cache/efficient_attn/xla, or below $XDG_CACHE_HOME.

    To be called before anything is compiled. What jax's own variables say comes first:
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing, JAX_COMPILATION_CACHE_DIR names another
    folder. Where no folder can be made, nothing is kept. Any number of processes may share one.
    """
    known = jax.config.values
    if not known["jax_enable_compilation_cache"] or known["jax_compilation_cache_dir"]:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = root / "efficient_attn" / "xla" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    _drop_halves(folder)
    jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """Eight hex digits for this kind of processor: a home may be shared by machines."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    kind = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return hashlib.sha256("\n".join([os.uname().machine, *kind]).encode()).hexdigest()[:8]


def _drop_halves(folder: Path) -> None:
    """Remove entries whose writer was killed: jax notes the time of use once an entry is whole.

    jax would keep such an entry, warn at every start that it cannot be read, and write no others.
    """
    lock = filelock.FileLock(folder / ".lockfile")  # jax's own, held while one writes
    with contextlib.suppress(filelock.Timeout, OSError), lock.acquire(timeout=0):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink(missing_ok=True)
