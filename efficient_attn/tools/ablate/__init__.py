"""Ablations: a paper's table or figure run again by one command, its numbers beside ours."""

from efficient_attn.tools.ablate.results import Results
from efficient_attn.tools.ablate.runners import Measuring, Training
from efficient_attn.tools.ablate.smoke import at_smoke, drawn_at_smoke
from efficient_attn.tools.ablate.sweep import (
    Claim,
    Column,
    Panel,
    Row,
    Scale,
    Sweep,
    attentions,
    published_of,
)

__all__ = [
    "Claim",
    "Column",
    "Measuring",
    "Panel",
    "Results",
    "Row",
    "Scale",
    "Sweep",
    "Training",
    "at_smoke",
    "attentions",
    "drawn_at_smoke",
    "published_of",
]
