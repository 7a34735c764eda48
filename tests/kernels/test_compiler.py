"""What XLA is told before it compiles for a CPU."""

import os
import subprocess
import sys

from tests.conftest import ROOT

CODE = """
import sys
import jax
from kernels.compiler import without_ynnpack
if sys.argv[1] == "without":
    without_ynnpack()
text = jax.jit(lambda x: (x @ x).sum()).lower(jax.numpy.ones((512, 512))).compile().as_text()
print("ynn" in text)
"""


def hands_over(how, flags=""):
    """Whether XLA leaves a product to YNNPACK."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip() == "True"


def test_xla_compiles_products_itself_unless_told_otherwise():
    assert hands_over("with"), "else there is nothing to do any more"
    assert not hands_over("without")
    assert hands_over("without", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT")
