"""The attention mechanisms and the backbones, for a terminal."""

import dataclasses
import inspect
import textwrap

from rich.console import Console

from efficient_attn import attention
from efficient_attn.backbones import BACKBONES


def print_mechanisms(console: Console | None = None) -> None:
    """Every mechanism: what it is, its paper, what it supports, its options and their meaning."""
    console = console or Console(highlight=False, soft_wrap=True)
    for row in attention.describe():
        console.print(f"[bold]{row.name}[/]  ", end="")
        console.print(row.summary, f"{row.paper}", sep="\n  ", markup=False)
        console.print(f"  supports: {', '.join(row.supports)}", markup=False)
        for option in row.options:
            console.print(f"    {option.name}={option.default}  ({option.kind})", markup=False)
        console.print(textwrap.indent(row.notes, "  | "), "", sep="\n", markup=False)
    console.print(
        "--config.attention takes an expression: performer(features=64), an expression inside an\n"
        "expression, lsra(attention=linformer), or layers in turn, performer*2 + softmax.",
        markup=False,
    )


def print_backbones(console: Console | None = None) -> None:
    """Every backbone: what it is, its options with their defaults, and what they mean."""
    console = console or Console(highlight=False, soft_wrap=True)
    for name, cls in BACKBONES.items():
        summary = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        console.print(f"[bold]--config.model.name={name}[/]")
        console.print(textwrap.indent(summary, "  "), markup=False)
        for option in attention.options(cls.Config()):
            console.print(f"    {option.name}={option.default}  ({option.kind})", markup=False)
        parts = [part for part in reversed(cls.Config.__mro__) if dataclasses.is_dataclass(part)]
        notes = "\n".join(inspect.cleandoc(part.__doc__ or "") for part in parts)
        console.print(textwrap.indent(notes, "  | "), "", sep="\n", markup=False)
