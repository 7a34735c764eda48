"""Light image models as published: a table of stages each, and the weights of others for them."""

from efficient_attn.backbones.images import (
    avit,
    dynamicvit,
    efficientformer,
    efficientvit,
    evit,
    levit,
    lv_vit,
    mobile_former,
    mobilenet,
    mobilevit,
    poolformer,
    pvt_v2,
    regnet,
    resnet,
    swin,
    t2t_vit,
    vision_transformer,
)
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.backbones.images.weights import Report, load, save

__all__ = ["VARIANTS", "Report", "Variant", "load", "save"]

VARIANTS: dict[str, Variant] = {
    **avit.VARIANTS,
    **dynamicvit.VARIANTS,
    **efficientformer.VARIANTS,
    **efficientvit.VARIANTS,
    **evit.VARIANTS,
    **vision_transformer.VARIANTS,
    **levit.VARIANTS,
    **lv_vit.VARIANTS,
    **mobile_former.VARIANTS,
    **mobilenet.VARIANTS,
    **mobilevit.VARIANTS,
    **poolformer.VARIANTS,
    **pvt_v2.VARIANTS,
    **regnet.VARIANTS,
    **resnet.VARIANTS,
    **swin.VARIANTS,
    **t2t_vit.VARIANTS,
}
"""Every published network, by the name that `config.model.name` gives it."""
