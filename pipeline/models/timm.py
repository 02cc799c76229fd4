"""Image backbones of timm (Wightman 2019): VGG, ResNet, Inception, ViT, ConvNeXt and many more."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import timm
import torch
from pydantic import Field
from timm.layers import PatchEmbed, resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import group_parameters
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, FeatureMapSpec, Features
from pipeline.core.inputs import ImageInputs
from pipeline.core.specs import Architecture

ARCHITECTURES = ("timm", "models/*.py", r"^@register_model\ndef (\w+)")
TAGS = ("timm", "models/*.py", r"""^\s+['"]{model}\.(\w+)['"]:""")
MODALITY = "image"


class TimmOptions(Options):
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate")
    drop_rate: float = Field(
        0.0, ge=0, lt=1, description="dropout before the head, inside the backbone"
    )
    patch_size: int | None = Field(
        None,
        ge=1,
        description="vision transformers: pixels a side of a patch; none: the architecture's own. "
        "Small images want less",
    )


@register("model", "timm", options=TimmOptions)
class Timm(Backbone):
    """A timm model without its classifier; its parameters keep timm's names.

    Use it for images; ``timm-hub:NAME.TAG`` brings published weights. Wightman 2019, "PyTorch
    Image Models".

    Input: ``image`` (B, C, size, size).

    - ``pooled``: what timm feeds its classifier (VGG: 4096 numbers)
    - ``tokens`` (B, N, D), if the model has tokens, such as vision transformers
    - ``stages``: the maps of ``forward_intermediates``
    """

    def __init__(self, architecture: str, options: TimmOptions, inputs: ImageInputs):
        super().__init__(architecture, options, inputs)
        if "channels" not in inputs:
            raise ValueError(
                f"timm/{architecture} reads images; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        for option, argument in (
            ("drop_path", "drop_path_rate"),
            ("drop_rate", "drop_rate"),
            ("patch_size", "patch_size"),
        ):
            if getattr(options, option) and argument not in _arguments(architecture):
                raise ValueError(f"timm/{architecture} has no {option}: leave it out")
        if problem := _size_problem(
            architecture, inputs["channels"], inputs["size"], options.patch_size
        ):
            raise ValueError(problem)
        rates = {"drop_path_rate": options.drop_path, "drop_rate": options.drop_rate}
        self.model: Any = _create(
            architecture, inputs["channels"], inputs["size"], options.patch_size, **rates
        )
        self.arch = Architecture(f"timm/{architecture}", options.model_dump(), dict(inputs))
        self.creation_arguments = creation_arguments(
            architecture, inputs["channels"], inputs["size"], options.patch_size
        )
        """Arguments of ``timm.create_model`` that build ``model``, without dropout and stochastic
        depth.
        """
        self.pooled_dim = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        shape, _ = _probe_output_shape(
            architecture, inputs["channels"], inputs["size"], options.patch_size
        )
        self.token_dim = shape[2] if len(shape) == 3 else None
        embed: Any = (
            self.model.patch_embed if issubclass(type(self.model), VisionTransformer) else None
        )
        self.patch: int | None = int(embed.patch_size[0]) if type(embed) is PatchEmbed else None
        """Pixels a side of a plain vision transformer's patches, which ``token_mask`` can leave
        out; None for other models.
        """
        info = self.model.feature_info
        info = info.info if hasattr(info, "info") else info
        self.feature_map_specs = tuple(
            FeatureMapSpec(str(i["module"]), int(i["num_chs"]), int(i["reduction"])) for i in info
        )

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        x = batch["image"]
        stages: dict[str, Tensor] = {}
        if "stages" in want:
            x, maps = self.model.forward_intermediates(x)
            stages = dict(zip((stage.name for stage in self.feature_map_specs), maps, strict=True))
        elif token_mask is not None:
            x = self._visible(x, token_mask)
        else:
            x = self.model.forward_features(x)
        tokens = x if self.token_dim is not None else None
        return Features(self.model.forward_head(x, pre_logits=True), tokens=tokens, stages=stages)

    def _visible(self, x: Tensor, token_mask: Tensor) -> Tensor:
        """Encode only the patches where ``token_mask`` (B, N, row by row over the image) is false.

        Every row has k of them. Returns (B, prefix + k, D) tokens.
        """
        if self.patch is None:
            raise ValueError(
                f"{self.arch.name} cannot leave patches out: only plain vision transformers "
                "can (timm/vit_*, timm/deit_*)"
            )
        m = self.model
        x = m._pos_embed(m.patch_embed(x))
        prefix = m.num_prefix_tokens
        places = (~token_mask).nonzero()[:, 1].view(len(x), -1)
        index = places[:, :, None].expand(-1, -1, x.shape[2])
        kept = x[:, prefix:].gather(1, index)
        visible = torch.cat([x[:, :prefix], kept], dim=1)
        return m.norm(m.blocks(m.norm_pre(visible)))

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Adapt a checkpoint to these channels and this image size, by timm's rules.

        Weights of the first convolution are summed over colours for one channel, and repeated and
        divided for several. Position embeddings are resampled bicubically to this grid (Dosovitskiy
        et al. 2021, section 3.2).
        """
        out, notes = dict(tensors), []
        first: Any = self.model.pretrained_cfg.get("first_conv") or ()
        names = (first,) if isinstance(first, str) else first
        firsts = {f"model.{name}.weight" for name in names}
        for name, own in self.state_dict().items():
            tensor = out.get(name)
            if tensor is None or tensor.shape == own.shape or tensor.dim() != own.dim():
                continue
            has_same_kernel = tensor.shape[2:] == own.shape[2:]
            if name in firsts and tensor.shape[1] in (1, 3) and has_same_kernel:
                had, has = tensor.shape[1], own.shape[1]
                out[name] = (
                    adapt_input_conv(has, tensor) if had == 3 else tensor.repeat(1, has, 1, 1) / has
                )
                notes.append(
                    f"{name}: {had} input channels "
                    f"{'summed into' if has == 1 else 'repeated to'} {has}"
                )
            elif name == "model.pos_embed" and own.dim() == 3:
                prefix = getattr(self.model, "num_prefix_tokens", 1)
                if getattr(self.model, "no_embed_class", False):
                    prefix = 0
                old = math.isqrt(max(0, tensor.shape[1] - prefix))
                new = self.model.patch_embed.grid_size
                if old and old**2 + prefix == tensor.shape[1] and tensor.shape[2] == own.shape[2]:
                    # torch.fx.wrap hides from type checkers that it can be called
                    resample: Any = resample_abs_pos_embed
                    out[name] = resample(
                        tensor, new_size=list(new), old_size=[old, old], num_prefix_tokens=prefix
                    )
                    notes.append(
                        f"{name}: resampled from {old} x {old} to {new[0]} x {new[1]} patches"
                    )
            elif (
                name.endswith(".relative_position_bias_table") and tensor.shape[1:] == own.shape[1:]
            ):
                module: Any = self.get_submodule(name.rpartition(".")[0])
                window = module.window_size
                out[name] = resize_rel_pos_bias_table(
                    tensor, new_window_size=window, new_bias_shape=tuple(own.shape)
                )
                notes.append(f"{name}: resampled to a window of {window[0]} x {window[1]} patches")
        return out, notes

    def undecayed_parameters(self) -> set[str]:
        """Return what timm's ``no_weight_decay`` names: class tokens, position embeddings and bias
        tables.
        """
        exempt = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in exempt}

    def layers(self) -> dict[str, list[str]]:
        if hasattr(self.model, "group_matcher"):
            groups = group_parameters(self.model, self.model.group_matcher(coarse=False))
            ordered = [names for _, names in sorted(groups.items(), key=lambda item: item[0])]
        else:
            # a few models have no group_matcher: take their children in order, and the blocks of a
            # list one by one; parameters of the model itself go with the first child
            parts: dict[str, list[str]] = {}
            names = [name for name, _ in self.model.named_parameters()]
            stem = next(name for name in names if "." in name)
            for name in names:
                child, *rest = (name if "." in name else stem).split(".")
                listed = isinstance(getattr(self.model, child), (nn.Sequential, nn.ModuleList))
                parts.setdefault(f"{child}.{rest[0]}" if listed else child, []).append(name)
            ordered = list(parts.values())
        return {
            f"layer{i:02d}": [f"model.{name}" for name in names] for i, names in enumerate(ordered)
        }


@cache
def _arguments(architecture: str) -> frozenset[str]:
    """Return the argument names of an architecture's constructor."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        kind = type(timm.create_model(architecture, num_classes=0))
    return frozenset(
        name
        for base in kind.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(base).parameters
    )


def _create(
    architecture: str, channels: int, size: int, patch_size: int | None, **rates: float
) -> Any:
    """Create the timm model without a classifier for images of ``size`` pixels a side."""
    return timm.create_model(
        architecture,
        pretrained=False,
        **creation_arguments(architecture, channels, size, patch_size, **rates),
    )


def creation_arguments(
    architecture: str, channels: int, size: int, patch_size: int | None = None, **rates: float
) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model``; ``rates`` that a model does not take are left
    out.
    """
    known = _arguments(architecture)
    wanted: dict[str, Any] = {
        "in_chans": channels,
        "num_classes": 0,
        **{name: rate for name, rate in rates.items() if name in known},
    }
    config = timm.models.get_pretrained_cfg(architecture, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        wanted["img_size"] = size
    if patch_size is not None:
        wanted["patch_size"] = patch_size
    if "dynamic_img_size" in known:
        wanted["dynamic_img_size"] = True
    if "aux_logits" in known:
        # with the auxiliary head Inception v3 returns a tuple in evaluation too
        wanted["aux_logits"] = False
    return wanted


SEVERAL = "gives several tensors, not one"


@cache
def _probe_output_shape(
    architecture: str, channels: int, size: int, patch_size: int | None = None
) -> tuple[tuple[int, ...], str]:
    """Return the shape of the model's output for one image, and why it has none.

    The pass takes neither memory nor arithmetic (device meta). Returns (shape, "") or ((), reason).
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.no_grad():
            model = _create(architecture, channels, size, patch_size).eval()
            output = model.forward_features(torch.empty(1, channels, size, size))
            if not isinstance(output, Tensor):
                return (), SEVERAL
            model.forward_head(output, pre_logits=True)
            return tuple(output.shape), ""
    except Exception as error:  # assertions, shapes and more: each family has its own way to refuse
        return (), (f"{error}".strip() or type(error).__name__).splitlines()[0][:160]


@cache
def _size_problem(architecture: str, channels: int, size: int, patch_size: int | None) -> str:
    """Describe why a model cannot read images of this size, and the next size that it can.

    "" where it can, and for a model that does not run on device meta.
    """
    reason = _probe_output_shape(architecture, channels, size, patch_size)[1]
    if reason == SEVERAL:
        return f"timm/{architecture} cannot be a backbone here: its forward_features {SEVERAL}"
    config = timm.models.get_pretrained_cfg(architecture, allow_unregistered=True)
    usual = config.input_size[-1] if config is not None else 224
    if not reason or (patch_size is None and _probe_output_shape(architecture, channels, usual)[1]):
        return ""
    least = next(
        (
            other
            for other in range(size + 1, max(size, usual) + 65)
            if not _probe_output_shape(architecture, channels, other, patch_size)[1]
        ),
        usual,
    )
    return (
        f"timm/{architecture} takes no images of {size} pixels a side ({reason}); the next size "
        f"that it takes is {least}: set it in data.modality"
    )
