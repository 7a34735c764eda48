"""Both directions: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import LINEARS, Problem, reference_of
from tests.mechanisms import gla, mamba2

VARIANTS = {
    "bidirectional": 2 * gla.VARIANTS["gla"],
    "bidirectional(mixer=mamba2(state=16))": 2 * mamba2.VARIANTS["mamba2(state=16)"],
    "bidirectional(mixer=local(window=10, pattern='blocked'))": 2 * LINEARS,
}

SCALE = {"bidirectional": 0.3}
"""A first token is norm(<q, k> v), a step where <q, k> is near 0; see `retention.py`. There is a
first token at either end here, and in bfloat16 more of them are near."""


def uncounted(config, length):
    inner = {"gla": gla, "mamba2": mamba2}.get(config.mixer.name)
    return 2 * inner.uncounted(config.mixer.config, length) if inner else 0


def reference(w, config, problem: Problem):
    inner = reference_of(config.mixer.name)
    forwards = problem._replace(causal=True)

    def turned(rows):
        """Backwards, but for the padding behind a row's last token; with segments, all of it."""
        length = rows.shape[1]
        keys = np.ones_like(problem.keys) if problem.segments.any() else problem.keys
        ends = [max(np.flatnonzero(row), default=length - 1) + 1 for row in keys]
        return np.stack([[*row[:n][::-1], *row[n:]] for row, n in zip(rows, ends, strict=True)])

    backwards = forwards._replace(
        x=turned(problem.x), keys=turned(problem.keys), segments=turned(problem.segments)
    )
    out = inner(w["forwards"], config.mixer.config, forwards)
    return out + turned(inner(w["backwards"], config.mixer.config, backwards))
