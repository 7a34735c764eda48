"""A finished run evaluated once more, under other attentions with the same parameters."""

from collections.abc import Mapping
from pathlib import Path

from efficient_attn.evals.run import evaluate_run


def re_evaluate(
    path: Path, attentions: Mapping[str, str], *, metric: str = "accuracy", limit: int | None = None
) -> dict[str, float]:
    """By each name, `metric` on test of the last checkpoint of the run, read under the expression.

    limit: the first so many examples only.

    Raises:
        UserError: no such run, or an expression whose parameters are others.
    """
    return {
        name: evaluate_run(path, attention=expression, limit=limit)[metric]
        for name, expression in attentions.items()
    }
