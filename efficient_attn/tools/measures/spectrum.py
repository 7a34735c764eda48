"""How many directions an attention matrix has: singular values of a trained model's weights."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from efficient_attn.config import require
from efficient_attn.tools.measures.attention_maps import softmax_maps, trained


def cumulative(weights: Float[np.ndarray, "... T S"]) -> Float[np.ndarray, "... R"]:
    """Sums of the i largest singular values over the sum of all, i = 1 ... min(T, S)."""
    values = np.linalg.svd(weights.astype(np.float64), compute_uv=False)
    return np.cumsum(values, axis=-1) / np.sum(values, axis=-1, keepdims=True)


def spectrum(path: Path, *, examples: int = 16) -> dict[str, Any]:
    """Normalised cumulative singular values of the softmax attention of a finished run on text
    (Wang et al. 2020, arXiv 2006.04768, figure 1), over the first `examples` of its test split.

    Returns means over the examples: "by_layer" [layers][length], of all heads; "by_head"
    [layers][heads] at a quarter of the length (the figure's 128 of 512); "quarter", the mean of
    that; "upper_quarter" and "lower_quarter", of the upper and lower half of the layers; and
    "rank_90", how many of the length reach 90 %, a share.

    Raises:
        UserError: no such run, or it has no softmax attention.
    """
    model, inputs = trained(path, examples=examples)
    weights = softmax_maps(model, inputs)
    require(len(weights) > 0, f"the model in {path} has no softmax attention")
    curves = np.stack([cumulative(np.asarray(w)).mean(axis=0) for w in weights])
    length, half = curves.shape[-1], len(curves) // 2
    by_head = curves[:, :, length // 4 - 1]
    mean = curves.mean(axis=(0, 1))
    return {
        "by_layer": curves.mean(axis=1).round(5).tolist(),
        "by_head": by_head.round(5).tolist(),
        "quarter": float(by_head.mean()),
        "lower_quarter": float(by_head[: max(half, 1)].mean()),
        "upper_quarter": float(by_head[half:].mean()),
        "rank_90": float(np.searchsorted(mean, 0.9) + 1) / length,
    }
