"""The attention mechanisms, for a terminal."""

import textwrap

from rich.console import Console

from efficient_attn import attention


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
