"""ViT (arXiv 2010.11929, table 1) and DeiT (arXiv 2012.12877, table 1) as published."""

from typing import Literal

from efficient_attn.backbones.images.variants import Variant
from efficient_attn.backbones.vit import Vit

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Width, depth and heads."""


def _variant(size: str, *, pool: Literal["cls", "distilled"], image_size: int = 224) -> Variant:
    width, depth, heads = SIZES[size]
    config = Vit.Config(
        width=width, depth=depth, heads=heads, patch=16, pool=pool, placed=True,
        mlp="gelu_exact", dropout=0.0,
    )  # fmt: skip
    return Variant(Vit, config, image_size)


VARIANTS = {f"vit_{size}_patch16_224": _variant(size, pool="cls") for size in SIZES}
VARIANTS |= {
    f"vit_{size}_patch16_384": _variant(size, pool="cls", image_size=384)
    for size in ("base", "large")
}
for _size in ("tiny", "small", "base"):
    VARIANTS[f"deit_{_size}_patch16_224"] = _variant(_size, pool="cls")
    VARIANTS[f"deit_{_size}_distilled_patch16_224"] = _variant(_size, pool="distilled")
VARIANTS["deit_base_patch16_384"] = _variant("base", pool="cls", image_size=384)
VARIANTS["deit_base_distilled_patch16_384"] = _variant("base", pool="distilled", image_size=384)
