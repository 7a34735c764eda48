"""Separable self-attention: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import Problem, linear

VARIANTS = {"separable": 32 * 65 + 65 + 32 * 32 + 32}


def reference(w, config, problem: Problem):
    source = problem.x if problem.context is None else problem.context
    kernel, bias = w["project"]["kernel"], w["project"]["bias"]
    value = np.maximum(problem.x @ kernel[:, 33:] + bias[33:], 0)
    out = np.zeros_like(problem.x)
    for b in range(len(source)):
        seen = source[b, problem.keys[b]]
        if len(seen):
            share = np.exp(seen @ kernel[:, 0] + bias[0])
            keys = seen @ kernel[:, 1:33] + bias[1:33]
            out[b] = value[b] * (share @ keys / share.sum())
    return linear(w["out"], out)
