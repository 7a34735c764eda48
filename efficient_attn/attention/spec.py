"""From an expression such as `lsra(attention=performer(features=64))*2 + softmax` to mechanisms.

The expression is Python's, read by `ast` and never evaluated: names, keyword options, `*` and `+`.
"""

import ast
from collections.abc import Mapping

from efficient_attn.attention.base import Choice, Mechanism
from efficient_attn.config import build
from efficient_attn.errors import UserError, unknown

LAYERS = 10_000
"""A pattern has no more."""


def parse(text: str, table: Mapping[str, type[Mechanism]]) -> tuple[Choice, ...]:
    """The pattern of layers that `text` names; a single mechanism is a pattern of one.

    Raises:
        UserError: bad syntax, an unknown mechanism or option, a value of the wrong type or range.
    """
    try:
        return _pattern(ast.parse(text.strip(), mode="eval").body, text, table)
    except SyntaxError as error:
        raise UserError(
            f"cannot read the attention {text!r}: {error.msg}; write name(option=value), a*2 + b"
        ) from None
    except (RecursionError, MemoryError):  # what Python's parser says of deep nesting
        raise UserError(
            f"an attention of {len(text)} signs, {text[:20]!r}..., is too deep; write a*2 for a + a"
        ) from None


def tile(pattern: tuple[Choice, ...], depth: int) -> tuple[Choice, ...]:
    """The mechanism of each of `depth` layers, the pattern repeated from the first.

    Raises:
        UserError: the pattern is longer than the stack.
    """
    if len(pattern) > depth:
        label = " + ".join(map(str, pattern))
        raise UserError(f"attention {label!r} names {len(pattern)} layers, the model has {depth}")
    return tuple(pattern[layer % len(pattern)] for layer in range(depth))


def _pattern(node: ast.expr, text: str, table) -> tuple[Choice, ...]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left, text, table) + _pattern(node.right, text, table)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        layers, times = node.left, node.right
        if isinstance(layers, ast.Constant):
            layers, times = times, layers
        if not (isinstance(times, ast.Constant) and type(times.value) is int and times.value > 0):
            raise UserError(
                f"in the attention {text!r}, `*` takes a mechanism and a positive number"
            )
        layers = _pattern(layers, text, table)
        if len(layers) * times.value > LAYERS:
            raise UserError(
                f"in the attention {text!r}, `*` makes more than {LAYERS} layers; write fewer"
            )
        return layers * times.value
    return (_choice(node, text, table),)


def _choice(node: ast.expr, text: str, table) -> Choice:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise UserError(
            f"cannot read {ast.unparse(node)!r} in the attention {text!r}; it names no mechanism"
        )
    name = call.func.id
    if name not in table:
        raise unknown("attention", name, table)
    if call.args:
        raise UserError(
            f"options of {name} are written by name: {name}(option={ast.unparse(call.args[0])})"
        )
    options = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise UserError(f"`**` has no place in the attention {text!r}; name each option")
        if keyword.arg in options:
            raise UserError(f"{name} is given the option {keyword.arg} twice; keep one")
        options[keyword.arg] = _value(keyword.value, text, table)
    mechanism = table[name]
    return Choice(name, mechanism, build(mechanism.Config, options, where=name))


def _value(node: ast.expr, text: str, table):
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _choice(node, text, table)
