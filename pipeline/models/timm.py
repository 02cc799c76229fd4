"""Any image backbone of timm (Wightman 2019) under the Backbone contract: VGG, ResNet, Inception, ViT, ConvNeXt, EfficientNet, ..."""

from __future__ import annotations

from typing import Any

import timm
from pydantic import Field
from timm.models import group_parameters
from torch import Tensor

from pipeline.contracts import Backbone, Batch, Features, Stage
from pipeline.registry import Options, register

ARCHITECTURES = ("timm", "models/*.py", r"^@register_model\ndef (\w+)")


class TimmOptions(Options):
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the head, inside the backbone")


@register("model", "timm", options=TimmOptions)
class Timm(Backbone):
    """The plain timm model without its classifier; names of its parameters are timm's own.

    Input ``image`` (B, C, size, size). ``pooled`` is what timm feeds its classifier (VGG: 4096 wide); ``stages`` come from
    ``forward_intermediates`` on the same model.
    """

    def __init__(self, architecture: str, options: TimmOptions, inputs: dict[str, Any]):
        super().__init__(architecture, options, inputs)
        if "channels" not in inputs:
            raise ValueError(f"timm/{architecture} reads images; these rows are {', '.join(inputs) or 'something else'}")
        wanted: dict[str, Any] = {"in_chans": inputs["channels"], "num_classes": 0, "pretrained": False}
        config = timm.models.get_pretrained_cfg(architecture, allow_unregistered=True)
        if config is not None and config.fixed_input_size:
            wanted["img_size"] = inputs["size"]
        if architecture.startswith("inception_v3"):
            wanted["aux_logits"] = False  # with the auxiliary head it returns a tuple in evaluation too
        if options.drop_path:
            wanted["drop_path_rate"] = options.drop_path
        if options.drop_rate:
            wanted["drop_rate"] = options.drop_rate
        self.model: Any = timm.create_model(architecture, **wanted)
        self.arch = {"name": f"timm/{architecture}", "options": options.model_dump(), "inputs": dict(inputs)}
        self.pooled_dim = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        self.token_dim = self.model.num_features if hasattr(self.model, "blocks") and hasattr(self.model, "patch_embed") else None
        info = self.model.feature_info
        info = info.info if hasattr(info, "info") else info
        self.stage_info = tuple(Stage(str(i["module"]), int(i["num_chs"]), int(i["reduction"])) for i in info)

    def forward(self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()) -> Features:
        x = batch["image"]
        stages: dict[str, Tensor] = {}
        if "stages" in want:
            x, maps = self.model.forward_intermediates(x)
            stages = dict(zip((stage.name for stage in self.stage_info), maps, strict=True))
        else:
            x = self.model.forward_features(x)
        tokens = x if x.dim() == 3 else None
        return Features(self.model.forward_head(x, pre_logits=True), tokens=tokens, stages=stages)

    def layers(self) -> dict[str, list[str]]:
        groups = group_parameters(self.model, self.model.group_matcher(coarse=False))
        ordered = sorted(groups.items(), key=lambda item: item[0])
        return {f"layer{i:02d}": [f"model.{name}" for name in names] for i, (_, names) in enumerate(ordered)}
