"""Adapters: small trainable additions to a frozen backbone, by the library peft (LoRA).

Another method of peft is an options class and a small class over ``AdapterTechnique``: ``settings``
configures peft, what it adds is trained, and ``finish`` merges it. This suits every method that
replaces modules and can be merged (IA3, AdaLoRA, VeRA, OFT).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Literal

from pydantic import Field
from torch import nn

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Backbone, Task, Technique

ADDED = "adapters"
"""Part of a layer that holds what a method adds to it: ``block00/adapters``."""
ATTENTION = (
    # bert, roberta, electra; neox
    "query",
    "key",
    "value",
    "query_key_value",
    # distilbert
    "q_lin",
    "k_lin",
    "v_lin",
    # gpt2 (one matrix for all three); opt, llama, timm's eva
    "c_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    # timm's vit, deit, swin; pvt, cait, convit
    "qkv",
    "q",
    "k",
    "v",
    "kv",
    "qk",
)
"""Names of query, key and value projections, by family."""


class AdaptedTask(Task):
    """A task whose backbone holds adapters of peft.

    Its layers are those of the plain task, under the names that its parameters have now, each
    followed by the adapters inside it. The adapters' weights are drawn from torch's generator.

    Args:
        task: The plain task; its backbone is changed in place.
        tuner: peft's class, such as ``LoraModel``.
        settings: peft's configuration.
    """

    def __init__(self, task: Task, tuner: Any, settings: Any):
        super().__init__(task.backbone, task.objective)
        named = dict(task.named_parameters())
        owner = {id(named[name]): layer for layer, names in task.layers().items() for name in names}
        inside = {name.rpartition(".")[0]: owner[id(named[name])] for name in named}
        # In a list: torch would file it, and every parameter, a second time
        self._tuner = [tuner(task.backbone, settings, "default")]
        parts = {layer: (layer, f"{layer}/{ADDED}") for layer in task.layers()}
        self._layers: dict[str, list[str]] = {part: [] for both in parts.values() for part in both}
        for name, parameter in self.named_parameters():
            if id(parameter) in owner:
                self._layers[owner[id(parameter)]].append(name)
                continue
            module = name
            while module not in inside:
                module = module.rpartition(".")[0]
            self._layers[f"{inside[module]}/{ADDED}"].append(name)
        for layer in parts:
            if not self._layers[f"{layer}/{ADDED}"]:
                del self._layers[f"{layer}/{ADDED}"]
        self._called: set[str] = set()
        self._hooks: list[Any] = [
            module.register_forward_hook(_Note(self._called, name))
            for name, module in self._watched().items()
        ]

    def layers(self) -> dict[str, list[str]]:
        return {layer: list(names) for layer, names in self._layers.items()}

    def adapters(self) -> list[str]:
        """Return the names, in the backbone, of the modules that were replaced."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [
            name
            for name, module in self.backbone.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]

    def _watched(self) -> dict[str, nn.Module]:
        names = self.adapters()
        return {
            name: self.backbone.get_submodule(name)
            for name in dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)])
        }

    def check_called(self) -> None:
        """Raise ValueError, after the first batch, for adapters that their block did not call.

        Some blocks (timm's beit, eva and swinv2) multiply by the weight of a module without calling
        it: an adapter there has no effect.
        """
        if not self._hooks or not self._called:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        past = [
            name
            for name in self.adapters()
            if name not in self._called and name.rpartition(".")[0] in self._called
        ]
        if past:
            good = sorted(
                {name.rpartition(".")[2] for name in self.adapters()}
                - {name.rpartition(".")[2] for name in past}
            )
            raise ValueError(
                f"{self.backbone.arch.name} uses the weights of {_some(past)} without calling "
                "these modules, so that adapters there do nothing. Name others by their endings, "
                f"as in modules: [{', '.join(good) or '...'}]"
            )

    def merged(self) -> Task:
        """Merge the adapters into the weights and return the plain task; this one cannot be used
        then.
        """
        for hook in self._hooks:
            hook.remove()
        self._tuner.pop().merge_and_unload()
        return Task(self.backbone, self.objective)


class _Note:
    """A forward hook that records that its module was called."""

    def __init__(self, called: set[str], name: str):
        self.called, self.name = called, name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.called.add(self.name)


class AdapterTechnique(Technique, ABC):
    """Train adapters at ``lr_scale`` times ``lr`` and the head at ``lr``, nothing else."""

    @abstractmethod
    def settings(self, chosen: dict[str, nn.Module]) -> tuple[Any, Any]:
        """Return peft's tuner class and configuration; ``wrap`` fills in ``target_modules``."""

    def wrap(self, task: Task) -> Task:
        """Add the adapters.

        Raises ValueError where the backbone lacks the modules that are named.
        """
        chosen = choose_modules(task.backbone, self.options.modules)
        tuner, settings = self.settings(chosen)
        # An expression of whole names: a list would match endings
        settings.target_modules = "|".join(name.replace(".", r"\.") for name in chosen)
        return AdaptedTask(task, tuner, settings)

    def rates(self, layers, phase):
        return {
            name: self.options.lr_scale if name.endswith(f"/{ADDED}") else float(name == "head")
            for name in layers
        }

    def penalty(self, task, batch, streams):
        if isinstance(task, AdaptedTask) and len(batch):
            task.check_called()
        return None

    def finish(self, task):
        return task.merged() if isinstance(task, AdaptedTask) else task


def adaptable_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that adapters can be merged into, by name.

    They are linear layers, GPT-2's Conv1D and plain convolutions. Left out are subclasses (weights
    that are standardised or normalised first, the output layer of torch's MultiheadAttention) and
    grouped or dilated convolutions: peft 0.21 cannot merge the first and ignores the dilation of
    the second.
    """
    from transformers.pytorch_utils import Conv1D

    def is_plain(module: nn.Module) -> bool:
        kind = type(module)
        # Conv2dSame is timm's, of the efficientnets from TensorFlow: it pads and convolves
        if kind is not nn.Conv2d and kind.__name__ != "Conv2dSame":
            return kind in (nn.Linear, Conv1D)
        assert isinstance(module, nn.Conv2d)
        is_dilated = set(module.dilation) != {1}
        return module.groups == 1 and not is_dilated and module.padding_mode == "zeros"

    return {name: module for name, module in backbone.named_modules() if is_plain(module)}


def choose_modules(backbone: Backbone, modules: str | list[str]) -> dict[str, nn.Module]:
    """Return the adaptable modules that an option means: "attention", "all", or endings of names.

    Raises ValueError where one of them means none.
    """
    found = adaptable_modules(backbone)
    wanted = ("",) if modules == "all" else ATTENTION if modules == "attention" else tuple(modules)
    hits = {
        ending: [name for name in found if not ending or f".{name}".endswith(f".{ending}")]
        for ending in wanted
    }
    without = [ending for ending in wanted if not hits[ending]] if isinstance(modules, list) else []
    chosen = {name for names in hits.values() for name in names}
    if not chosen or without:
        asked = (
            f"ending with {', '.join(without)}"
            if without
            else "for attention"
            if modules == "attention"
            else "that could be adapted"
        )
        kinds = Counter(
            f"{name.rpartition('.')[2]} ({type(module).__name__})" for name, module in found.items()
        )
        there = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(12)) or "none"
        raise ValueError(
            f"{backbone.arch.name} has no module {asked}. Its linear and convolution layers, by "
            f"the ends of their names: {there}. Give modules: all, or a list of such endings"
        )
    return {name: module for name, module in found.items() if name in chosen}


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


class LoraOptions(LayerOptions):
    rank: int = Field(8, ge=1, description="rank of the update of each weight")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the adapters' input, in training"
    )
    modules: Literal["attention", "all"] | list[str] = Field(
        "all",
        description="where: attention (query, key and value projections), all linear and "
        "convolution layers, or a list of endings of module names",
    )
    lr_scale: float = Field(1.0, gt=0, description="learning rate of the adapters, relative to lr")
    rslora: bool = Field(
        False,
        description="scale by alpha / sqrt(rank), so that high ranks learn as fast (Kalajdzievski "
        "2023)",
    )
    dora: bool = Field(
        False,
        description="train the length of each weight's columns beside their direction (DoRA, Liu "
        "et al. 2024)",
    )


@register("technique", "lora", options=LoraOptions)
class Lora(AdapterTechnique):
    """Low-rank updates of frozen weights (Hu et al. 2022): W + alpha / rank B A.

    A (rank, in) starts random, B (out, rank) zero. All linear layers by default: adapting attention
    alone falls behind full fine-tuning (Dettmers et al. 2023, section 4; Biderman et al. 2024).
    """

    def settings(self, chosen):
        from peft import LoraConfig, LoraModel
        from transformers.pytorch_utils import Conv1D

        o = self.options
        return LoraModel, LoraConfig(
            r=o.rank,
            lora_alpha=o.alpha,
            lora_dropout=o.dropout,
            use_rslora=o.rslora,
            use_dora=o.dora,  # type: ignore[arg-type]
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen.values()),
        )
