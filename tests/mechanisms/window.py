"""Windows of a picture: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import LINEARS, Problem, exact, multihead

VARIANTS = {
    # a table of 9 x 9 distances for each of 4 heads, at 10 x 10 places
    "window(window=5, shift=2)": LINEARS + 4 * 81,
    "window(window=4, shift=1, bias='none')": LINEARS,
    "window(window=12, shift=6)": LINEARS + 4 * 19 * 19,
}


def reference(w, config, problem: Problem):
    """Place (r, c) is in window ((r - s) // M, (c - s) // M); s = 0 where one window is all."""
    sides = [min(config.window, side) for side in problem.grid]
    shifts = [0 if side <= config.window else config.shift for side in problem.grid]
    places = list(np.ndindex(*problem.grid))
    length = len(places)
    near, bias = np.zeros((length, length), bool), np.zeros((1, problem.heads, length, length))

    def window(place):
        return [(at - shift) // side for at, shift, side in zip(place, shifts, sides, strict=True)]

    for t, s in np.ndindex(length, length):
        near[t, s] = window(places[t]) == window(places[s])
        if near[t, s] and config.bias == "relative":
            down, right = (places[t][axis] - places[s][axis] for axis in (0, 1))
            row = (down + sides[0] - 1) * (2 * sides[1] - 1) + right + sides[1] - 1
            bias[0, :, t, s] = w["core"]["table"][row]

    def core(q, k, v):
        return exact(q, k, v, problem.seen() & near[None, None], bias=bias)

    return multihead(w, problem, core)
