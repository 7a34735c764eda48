"""Sets that are generated: by several processes, once, and read from a file from then on."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from efficient_attn.data.base import Config
from efficient_attn.errors import UserError

Arrays = dict[str, np.ndarray]
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def stored(config: Config, name: str, key: str, make: Callable[[Path], Arrays]) -> Arrays:
    """What `make` gives, from the cache folder's NAME-KEY.npz where that is there already.

    make: is given a folder for parts that are done (see `part`), which goes when all is.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = Path(config.cache or os.environ.get("EFFICIENT_ATTN_CACHE") or "data_cache")
    path = folder / f"{name}-{key}.npz"
    _sweep(path)
    arrays = _read(path)
    if arrays is None:
        parts = path.with_suffix(".parts")
        arrays = make(parts)
        _write(path, arrays)
        shutil.rmtree(parts, ignore_errors=True)
    return arrays


def part(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives, kept in this file: generation that was killed goes on from there.

    Raises:
        UserError: the file cannot be written.
    """
    found = _read(path)
    if found is None:
        found = {"part": make()}
        _write(path, found)
    return found["part"]


def key(options: Any, *, seed: int, version: int, shard: int) -> str:
    """A hash of all that a generated set depends on; `options.processes` does not count.

    version: of the generator; shard: examples drawn from one seed.
    """
    facts = asdict(options) | {"seed": seed, "version": version, "shard": shard}
    del facts["processes"]
    return digest(facts)


def digest(facts: Mapping[str, Any]) -> str:
    """A hash of these facts."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def stream(name: str) -> Callable[[], float]:
    """Random numbers in [0, 1) that depend on this name alone.

    Of Python's generator only `random()` is used: the one method whose stream Python promises to
    keep.
    """
    raw = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(raw)).random


@contextlib.contextmanager
def workers(processes: int, *, jobs: float) -> Iterator[Map]:
    """A `map` over several processes, one per core where `processes` is 0, but never over `jobs`.

    jobs: for how many processes there is enough to do: a process takes a second to start.
    """
    processes = processes or max(1, min(os.cpu_count() or 1, int(jobs)))
    if processes == 1:
        yield map
        return
    # Spawned, not forked: JAX's threads may be running already, and do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged ({error}): generating it anew", stacklevel=2)
        return None


def _sweep(path: Path) -> None:
    """Remove what writers of this file left that were killed: nobody has touched it for an hour."""
    for left in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _write(path: Path, arrays: Arrays) -> None:
    """Write under another name and rename, so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"cannot write the cache {path} ({error.strerror}): free some space, or name another "
            f"folder with --config.data.cache or $EFFICIENT_ATTN_CACHE"
        ) from error
