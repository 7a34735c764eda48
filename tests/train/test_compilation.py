"""Compiled programs are kept, by any number of processes, some of which are killed."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import sys
import jax
from efficient_attn.train import compilation
compilation.LEAST = 0.0
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
compilation.keep_compiled()
f = jax.jit(lambda x: jax.numpy.tanh(x @ x.T).sum())
for _ in range(2):
    print(float(f(jax.numpy.eye(7))), sum(hits))
    jax.clear_caches()
"""


def compiled(home, **environment):
    """(what each of two calls gave, how many programs had been found by then) and the entries."""
    variables = os.environ | {"XDG_CACHE_HOME": str(home), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=True,
        env=variables | environment,
    )  # fmt: skip
    assert not done.stderr, "jax has nothing to say"
    values, hits = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert len(set(values)) == 1
    return [int(n) for n in hits], sorted(home.glob("efficient_attn/xla/*/*-cache"))


def test_what_is_compiled_is_kept_and_half_an_entry_is_not(tmp_path):
    hits, entries = compiled(tmp_path)
    assert hits[0] == 0 and hits[1] > 0 and entries
    for entry in entries:  # as they are when their writer is killed
        entry.write_bytes(entry.read_bytes()[:100])
        entry.with_name(entry.name.removesuffix("cache") + "atime").unlink()
    hits, again = compiled(tmp_path)
    assert hits[0] == 0 and hits[1] > 0 and again == entries
    assert all(entry.stat().st_size > 100 for entry in again)


@pytest.mark.slow
def test_nothing_is_kept_where_that_is_not_wanted_or_cannot_be(tmp_path):
    assert compiled(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ([0, 0], [])
    (tmp_path / "efficient_attn").touch()
    assert compiled(tmp_path) == ([0, 0], [])
    own = tmp_path / "own"
    hits, entries = compiled(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
    assert not entries and own.exists()
