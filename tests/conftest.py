"""Strictness for every test: shapes checked, no silent rank promotion, 8 CPU devices."""

import gc
import importlib.metadata
import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COMPILING = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
"""Compiling is most of what tests do: let it not optimize, nor cut each program into 32 modules."""
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that others die of
    COMPILING += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILING}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # that of a user stays theirs

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["efficient_attn", "kernels"], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")


RUNS = {"train", "evals", "tools"}
"""Folders of few and long tests: begun last, they would keep one worker waiting."""

LEFT_OUT = {"test_bfloat16_stays_near_float32", "test_compiled_memory_grows_linearly"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Under `-n` one worker has all tests of an expression or ablation, or else of a file; whole
    runs first.

    `further` marks the tests of a mechanism's options beyond its first variant; those of the
    contract and `LEFT_OUT` are `slow`: the comparison with float64 formulas covers their masks.
    """
    from tests import support  # with jax, which the lines above have set up

    items.sort(key=lambda item: item.path.parent.name not in RUNS)  # else stable
    for item in items:
        options = item.callspec.params if hasattr(item, "callspec") else {}
        expression = options.get("expression")
        group = expression if isinstance(expression, str) else options.get("ablation", item.path)
        item.add_marker(pytest.mark.xdist_group(str(group)))
        if expression in support.EXPRESSIONS and expression not in support.FIRSTS:
            item.add_marker(pytest.mark.further)
            contract = item.path == ROOT / "tests" / "attention" / "test_contract.py"
            if contract or item.originalname in LEFT_OUT:
                item.add_marker(pytest.mark.slow)
    gc.freeze()  # modules and items stay: looking through them took a sixth of what tracing takes
    gc.set_threshold(20_000, 20, 50)


RAN = itertools.count(1)


def pytest_runtest_teardown():
    """Let executables go: each maps memory, of which Linux grants a process 65,530 pieces."""
    if next(RAN) % 300 == 0:
        jax.clear_caches()
