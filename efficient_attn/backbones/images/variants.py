"""Published image models by name, in timm's words where timm has them."""

from dataclasses import dataclass
from typing import Any

from efficient_attn.backbones.base import Backbone


@dataclass(frozen=True)
class Variant:
    """A published network: its family, the table of its stages, and the size of its images."""

    family: type[Backbone]
    config: Any
    image_size: int = 224
