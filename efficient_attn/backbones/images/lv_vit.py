"""LV-ViT (All Tokens Matter, arXiv 2104.10858) as released: a vision transformer behind a stem of
convolutions, whose patches are classified as well as its class token.

The classifier of the patches is among the published parameters, and evaluation adds half of its
highest score of each class. Training is for these same logits; left out are the paper's dense
labels, a class for each patch from another network's maps (`Vit.token_logits` gives what they are
compared with), and MixToken, which mixes the patches of two images behind the stem.
"""

from efficient_attn.backbones.images.variants import Variant
from efficient_attn.backbones.vit import Vit


def _variant(
    width: int, depth: int, heads: int, *, skip_lam: float, stem: int = 64, image_size: int = 224
) -> Variant:
    config = Vit.Config(
        width=width, depth=depth, heads=heads, patch=16, stem=stem, pool="dense", placed=True,
        qkv_bias=False, mlp="gelu_exact", mlp_ratio=3.0, branch_scale=1 / skip_lam,
        norm_epsilon=1e-5, dropout=0.0,
    )  # fmt: skip
    return Variant(Vit, config, image_size)


VARIANTS = {
    "lvvit_t": _variant(240, 12, 4, skip_lam=1.0),
    "lvvit_s": _variant(384, 16, 6, skip_lam=2.0),
    "lvvit_m": _variant(512, 20, 8, skip_lam=2.0),
    "lvvit_l": _variant(768, 24, 12, skip_lam=3.0, stem=128, image_size=288),
}
