"""Multiply-adds and living arrays of a function, read off its jaxpr.

XLA's cost analysis counts the body of a scan once, whatever its length; this counts every turn.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

OUTSIDE = ""
"""The scope of what no `jax.named_scope` surrounds."""


def multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of all matrix products and convolutions in `function(*args)`.

    Elementwise work is not counted. A conditional counts as its dearest branch.

    Raises:
        ValueError: a while loop, whose number of turns is not in the jaxpr.
    """
    return sum(by_scope(jax.make_jaxpr(function)(*args)).values())


def by_scope(jaxpr: core.ClosedJaxpr) -> dict[str, int]:
    """Multiply-adds of each outermost `jax.named_scope`; see `multiply_adds`."""
    return dict(_count(jaxpr.jaxpr, OUTSIDE))


def _count(jaxpr: core.Jaxpr, scope: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        total += _equation(equation, scope or scope_of(equation))
    return total


def scope_of(equation: core.JaxprEqn) -> str:
    """The outermost `jax.named_scope` around an equation, or `OUTSIDE`."""
    return str(equation.source_info.name_stack).partition("/")[0]


def _equation(equation: core.JaxprEqn, scope: str) -> Counter[str]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        of_each = math.prod(left[i] for i in contracted)
        return Counter({scope: math.prod(_shape(equation.outvars[0])) * of_each})
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        of_each = math.prod(kernel) // features
        return Counter({scope: math.prod(_shape(equation.outvars[0])) * of_each})
    if name == "while":
        raise ValueError("cannot count a while loop: its number of turns is not in the jaxpr")
    inner = [_count(j, scope) for j in inside(equation)]
    if name == "cond":
        return max(inner, key=lambda branch: branch.total())
    turns = params.get("length", 1) if name == "scan" else 1
    total = sum(inner, Counter())
    return Counter({scope: turns * count for scope, count in total.items()})


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def inside(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The jaxprs that an equation runs: a body, branches."""
    return [j for value in equation.params.values() for j in _jaxprs(value)]


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, (tuple, list)) else []


def peak_bytes(jaxpr: core.ClosedJaxpr) -> dict[str, int]:
    """The most bytes alive at once in each outermost `jax.named_scope`, arguments not counted.

    Arrays are those of the jaxpr, each alive from the equation that makes it to the last that reads
    it: what a machine that fuses nothing would hold. A scan holds its results and its body.
    """
    peaks: dict[str, int] = {}
    _walk(jaxpr.jaxpr, OUTSIDE, 0, peaks)
    return peaks


def _walk(jaxpr: core.Jaxpr, scope: str, below: int, peaks: dict[str, int]) -> None:
    """Add the peaks of a jaxpr that runs while `below` bytes live around it."""
    last = {}
    for at, equation in enumerate(jaxpr.eqns):
        last |= {v: at for v in equation.invars if isinstance(v, core.Var)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    made: dict[core.Var, int] = {}
    for at, equation in enumerate(jaxpr.eqns):
        here = scope or scope_of(equation)
        results = {v: _bytes(v.aval) for v in equation.outvars if v in last}
        around = made | results if equation.primitive.name == "scan" else made
        for inner in inside(equation):
            _walk(inner, here, below + sum(around.values()), peaks)
        made |= results
        peaks[here] = max(peaks.get(here, 0), below + sum(made.values()))
        made = {v: size for v, size in made.items() if last[v] > at}


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
