"""Adapters: small trainable additions to a frozen backbone, by the library peft.

Another method of peft is an options class and a small class over ``AdapterTechnique``: ``settings``
configures peft, what it adds is trained, and ``finish`` merges it into the weights.

Every weight matrix of a backbone is reached. peft replaces the modules that it knows; other weights
(recurrent layers, torch's attention, grouped, dilated and standardised convolutions) become the
weight of a linear layer that peft adapts, and are computed from it (``_WeightAsLinear``). Left
alone are embeddings, depthwise convolutions, whose kernels are smaller than an adapter, and weights
that are parametrised already (wav2vec 2.0's positional convolution).

With ``quantize: nf4`` (QLoRA, Dettmers et al. 2023) the weights of linear layers that ``lora``
adapts are held in 4 bits while it trains. They come back to full precision when adapters are
merged, as 4 bits left them. So the network that is tested, saved and exported is the one that was
trained. Its weights differ from the source's by more than a matrix of low rank, so a bundle holds
them whole.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Backbone, Task, Technique
from pipeline.core.nn import four_bit
from pipeline.core.nn.called_modules import CalledModules
from pipeline.core.nn.losses import without_autocast

ADDED = "adapters"
"""Part of a layer that holds what a method adds to it: ``block00/adapters``."""
ADAPTER = "default"
"""peft's name of the one adapter that there is."""
MULTIPLIERS = frozenset(("ia3_l", "lora_magnitude_vector"))
"""peft's names of parameters that multiply weights: IA3's vectors and DoRA's lengths."""
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
    # deberta (one matrix for all three), deberta-v2; modernbert; phi3; wav2vec2-bert
    "self.in_proj",
    "query_proj",
    "key_proj",
    "value_proj",
    "Wqkv",
    "qkv_proj",
    "linear_q",
    "linear_k",
    "linear_v",
    # timm's vit, deit, swin; pvt, cait, convit
    "qkv",
    "q",
    "k",
    "v",
    "kv",
    "qk",
    # torch's MultiheadAttention (all three)
    "in_proj_weight",
)
"""Names of query, key and value projections, by family."""


class AdaptableWeight(NamedTuple):
    """A weight matrix of a backbone that can be adapted."""

    module: str
    """Name of its module."""
    weight: str
    """Name of the weight in the module."""
    kind: str
    """Class of the module."""

    @property
    def name(self) -> str:
        """Its module's name, or the parameter's where a module has several matrices."""
        return self.module if self.weight == "weight" else f"{self.module}.{self.weight}"

    def matches(self, ending: str) -> bool:
        """Whether the name of the weight or of its module ends like this."""
        names = (self.module, f"{self.module}.{self.weight}")
        return any(f".{name}".endswith(f".{ending}") for name in names)


class _WeightAsLinear(nn.Module):
    """A parametrisation that computes a weight from a linear layer that peft adapts.

    Args:
        weight: (rows, ...) of which the first dimension is the output.
        transposed: Whether the weight is (input, output), as GPT-2's.
        weight_of: Gives the weight (rows, columns) that an adapted layer applies.
    """

    def __init__(self, weight: Tensor, transposed: bool, weight_of: Callable[[Any], Tensor]):
        super().__init__()
        matrix = weight.detach().T if transposed else weight.detach().flatten(1)
        self.transposed, self.weight_of = transposed, weight_of
        rows, columns = matrix.shape
        self.linear: Any = nn.Linear(columns, rows, bias=False, device="meta")
        self.linear.weight = nn.Parameter(matrix.clone())

    def forward(self, original: Tensor) -> Tensor:
        with torch.autocast(original.device.type, enabled=False):
            is_adapted = hasattr(self.linear, "base_layer")
            matrix = self.weight_of(self.linear) if is_adapted else self.linear.weight
        return (matrix.T if self.transposed else matrix).reshape(original.shape)


CONVOLUTION = ("stride", "kernel_size", "padding", "dilation", "groups")
"""Settings of a convolution that models read (Whisper, MobileNetV2) and peft's layer does not have.
"""


def _show_settings(adapted: Any) -> None:
    """Give peft's layer over a convolution the settings of that convolution."""
    base = getattr(adapted, "base_layer", None)
    for name in CONVOLUTION:
        if hasattr(base, name) and not hasattr(adapted, name):
            setattr(adapted, name, getattr(base, name))


class AdaptedTask(Task):
    """A task whose backbone holds adapters of peft.

    Its layers are those of the plain task, under the names that its parameters have now, each
    followed by the adapters inside it. The adapters' weights are drawn from torch's generator.

    Args:
        task: The plain task; its backbone is changed in place.
        technique: Whose adapters are added.
        targets: The weights to adapt.
    """

    def __init__(self, task: Task, technique: AdapterTechnique, targets: list[AdaptableWeight]):
        super().__init__(task.backbone, task.objective)
        named = dict(task.named_parameters())
        owner = {id(named[name]): layer for layer, names in task.layers().items() for name in names}
        inside = {name.rpartition(".")[0]: owner[id(named[name])] for name in named}
        replaced: list[str] = []
        self._in_4_bits: dict[str, nn.Module] = {}
        self._computed: list[AdaptableWeight] = []
        self._orders: dict[str, list[str]] = {}
        for target in targets:
            module = task.backbone.get_submodule(target.module)
            if technique.replaces(task.backbone, target):
                replaced.append(target.module)
                if technique.is_held_in_4_bits(module):
                    self._hold_in_4_bits(target.module)
                continue
            weight = module.get_parameter(target.weight)
            linear = _WeightAsLinear(weight, _is_transposed(module), technique.weight_of)
            owner[id(linear.linear.weight)] = owner[id(weight)]
            self._computed.append(target)
            self._orders.setdefault(target.module, list(module._parameters))
            parametrize.register_parametrization(module, target.weight, linear, unsafe=True)
            replaced.append(f"{target.module}.parametrizations.{target.weight}.0.linear")
        is_transposed = any(_is_transposed(task.backbone.get_submodule(name)) for name in replaced)
        tuner, settings = technique.settings(is_transposed)
        # a regular expression matches whole names, a list would match endings
        settings.target_modules = "|".join(name.replace(".", r"\.") for name in replaced)
        with warnings.catch_warnings():
            # peft warns of settings that it adjusts to a layer
            warnings.simplefilter("ignore", UserWarning)
            # in a list: torch would register an attribute, and every parameter, twice
            self._tuner = [tuner(task.backbone, settings, ADAPTER)]
        for name in replaced:
            _show_settings(self.backbone.get_submodule(name))
        for name, module in self._in_4_bits.items():
            technique.start_adapter(self.backbone.get_submodule(name), _matrix_of(module))
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # no second copy
        parts = {layer: (layer, f"{layer}/{ADDED}") for layer in task.layers()}
        self._layers: dict[str, list[str]] = {part: [] for both in parts.values() for part in both}
        for name, parameter in self.named_parameters():
            if id(parameter) in owner:
                self._layers[owner[id(parameter)]].append(name)
                continue
            module = name
            while module not in inside:
                module = module.rpartition(".")[0]
            # peft keeps a constant or two among its parameters
            layer = f"{inside[module]}/{ADDED}" if parameter.requires_grad else inside[module]
            self._layers[layer].append(name)
        for layer in parts:
            if not self._layers[f"{layer}/{ADDED}"]:
                del self._layers[f"{layer}/{ADDED}"]
        computed = tuple(f"{target.module}.parametrizations." for target in self._computed)
        self.calls = CalledModules(
            self.backbone, [name for name in self.adapters() if not name.startswith(computed)]
        )

    def layers(self) -> dict[str, list[str]]:
        return {layer: list(names) for layer, names in self._layers.items()}

    def undecayed_parameters(self) -> set[str]:
        """Add the adapters' parameters that multiply weights: at 0 the layer would be gone."""
        multipliers = {
            name for name, _ in self.named_parameters() if MULTIPLIERS.intersection(name.split("."))
        }
        return super().undecayed_parameters() | multipliers

    def _hold_in_4_bits(self, name: str) -> None:
        """Put a layer whose weight is held in 4 bits in the place of a linear layer."""
        module = self.backbone.get_submodule(name)
        self._in_4_bits[name] = module
        bias: Any = module.bias
        self.backbone.set_submodule(name, four_bit.FourBitLinear(_matrix_of(module), bias))

    def _restore_precision(self) -> None:
        """Put linear layers under the adapters whose weights are what 4 bits hold."""
        for name in self._in_4_bits:
            adapted: Any = self.backbone.get_submodule(name)
            in_4_bits = adapted.base_layer
            linear = nn.Linear(
                in_4_bits.in_features, in_4_bits.out_features, bias=False, device="meta"
            )
            linear.weight, linear.bias = nn.Parameter(in_4_bits.weight), in_4_bits.bias
            adapted.base_layer = linear

    @property
    def tuner(self) -> Any:
        """peft's model over the backbone."""
        return self._tuner[0]

    def adapters(self) -> list[str]:
        """Return the names, in the backbone, of the layers that peft put in."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [
            name
            for name, module in self.backbone.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]

    def merged(self) -> Task:
        """Merge the adapters into the weights and return the plain task; this one cannot be used
        then.
        """
        self.calls.remove()
        self._restore_precision()
        self._tuner.pop().merge_and_unload()
        for name, original in self._in_4_bits.items():
            merged: Any = self.backbone.get_submodule(name)
            is_transposed = _is_transposed(original)
            weight = merged.weight.detach()
            original.weight = nn.Parameter(weight.T.contiguous() if is_transposed else weight)
            self.backbone.set_submodule(name, original)
        for target in self._computed:
            module = self.backbone.get_submodule(target.module)
            original = getattr(module, target.weight).detach().clone()
            parametrize.remove_parametrizations(module, target.weight, leave_parametrized=False)
            with torch.no_grad():
                module.get_parameter(target.weight).copy_(original)
        for name, order in self._orders.items():
            _restore_order(self.backbone.get_submodule(name), order)
        return Task(self.backbone, self.objective)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module's weight is (input, output): that of GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _matrix_of(module: nn.Module) -> Tensor:
    """Return the weight (output, input) of a linear layer."""
    weight: Any = module.weight
    return weight.detach().T if _is_transposed(module) else weight.detach()


def _restore_order(module: nn.Module, order: list[str]) -> None:
    """Put a module's parameters in the order that they had."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({name: parameters[name] for name in order})
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


class AdapterTechnique(Technique, ABC):
    """Train adapters at ``lr_scale`` times ``lr`` and the head at ``lr``, nothing else."""

    adds_modules = True
    replaced: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    """Classes of the modules that peft replaces for this method; other weights are computed from a
    linear layer that it adapts."""

    @abstractmethod
    def settings(self, is_transposed: bool) -> tuple[Any, Any]:
        """Return peft's tuner class and configuration; ``target_modules`` is filled in.

        Args:
            is_transposed: Whether weights of modules that peft replaces are (input, output).
        """

    def replaces(self, backbone: nn.Module, target: AdaptableWeight) -> bool:
        """Whether peft replaces the module of a weight."""
        module = backbone.get_submodule(target.module)
        owner, _, part = target.module.rpartition(".")
        is_read = part in submodules_read_without_call(type(backbone.get_submodule(owner)))
        return target.kind in self.replaced and not is_read and _is_plain(module)

    def is_held_in_4_bits(self, module: nn.Module) -> bool:
        """Whether the weight of a module that peft replaces is held in 4 bits."""
        return False

    def start_adapter(self, layer: Any, weight: Tensor) -> None:
        """Set the adapter of a layer whose weight is held in 4 bits.

        Args:
            layer: peft's layer.
            weight: (rows, columns) the weight in full precision.
        """

    def weight_of(self, layer: Any) -> Tensor:
        """Return the weight (rows, columns) that peft's layer over a linear layer applies."""
        return layer.base_layer.weight + layer.get_delta_weight(ADAPTER)

    def chosen(self, backbone: Backbone) -> list[AdaptableWeight]:
        """Return the weights to adapt. Raises ValueError where the backbone lacks them."""
        return choose_weights(backbone, self.options.modules)

    def check_backbone(self, backbone):
        self.chosen(backbone)

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "lr_scale": (0.3, 30.0),
        }

    def wrap(self, task: Task) -> Task:
        """Add the adapters.

        Raises ValueError where the backbone lacks the modules that are named.
        """
        return AdaptedTask(task, self, self.chosen(task.backbone))

    def rates(self, layers, phase):
        return {
            name: self.options.lr_scale if name.endswith(f"/{ADDED}") else float(name == "head")
            for name in layers
        }

    def penalty(self, task, batch, streams):
        if isinstance(task, AdaptedTask) and len(batch):
            task.calls.check(task.backbone.arch.name)
        return None

    def finish(self, task):
        return task.merged() if isinstance(task, AdaptedTask) else task


def _is_plain(module: nn.Module) -> bool:
    """Whether a convolution is neither grouped nor dilated: peft cannot merge the first and ignores
    the dilation of the second."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return True
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


@cache
def submodules_read_without_call(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of submodules whose weight ``forward`` reads without calling them.

    peft replaces a submodule such as ``self.qkv``. Where ``forward`` has ``F.linear(x,
    self.qkv.weight)`` and not ``self.qkv(x)``, the replacement is never called, so what is added
    has to be in the weight. Attention of timm's beit, eva and swinv2 and of transformers' WavLM
    reads weights so, and torch's encoder layer where it takes no gradient.

    Such names are found in the source code of ``forward`` and of the methods that it uses, as
    ``self.NAME.weight``; ``self.NAME.weight.dtype`` and ``isinstance(self.NAME.weight, ...)`` do
    not count.
    """
    read: set[str] = set()
    methods, seen = ["forward"], set[str]()
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    while methods:
        name = methods.pop()
        if name in seen:
            continue
        seen.add(name)
        functions = [vars(one)[name] for one in classes if name in vars(one)]
        for function in filter(inspect.isfunction, functions):
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            asked = _inspected(tree)
            for node in ast.walk(tree):
                match node:
                    case ast.Attribute(
                        value=ast.Attribute(value=ast.Name(id="self"), attr=part), attr="weight"
                    ) if id(node) not in asked:
                        read.add(part)
                    case ast.Attribute(value=ast.Name(id="self"), attr=used):
                        methods.append(used)
    return frozenset(read)


def _inspected(tree: ast.AST) -> set[int]:
    """Return the ids of nodes whose value is only asked for its type, device or shape."""
    ids = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):  # weight.dtype
            ids.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            ids.update(map(id, node.args))
    return ids


def adaptable_weights(backbone: nn.Module) -> list[AdaptableWeight]:
    """Return the weight matrices that adapters can be merged into, from input to output."""
    from transformers.pytorch_utils import Conv1D

    adaptable = []
    for name, module in backbone.named_modules():
        if parametrize.is_parametrized(module):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            weights = ["weight"]
        elif isinstance(module, nn.modules.conv._ConvNd):
            is_depthwise = module.groups > 1 and module.in_channels == module.groups
            weights = [] if is_depthwise else ["weight"]
        elif isinstance(module, nn.RNNBase):
            weights = [own for own in module._parameters if own.startswith("weight_")]
        elif isinstance(module, nn.MultiheadAttention):
            own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = [one for one in own if getattr(module, one) is not None]
        else:
            continue
        adaptable += [AdaptableWeight(name, weight, type(module).__name__) for weight in weights]
    return adaptable


def choose_weights(backbone: Backbone, modules: str | list[str]) -> list[AdaptableWeight]:
    """Return the weights that an option means: "attention", "all", or endings of names.

    Raises ValueError where one of them means none.
    """
    adaptable = adaptable_weights(backbone)
    wanted = ATTENTION if modules == "attention" else tuple(modules)
    without = [
        ending
        for ending in (wanted if isinstance(modules, list) else ())
        if not any(target.matches(ending) for target in adaptable)
    ]
    chosen = [
        target
        for target in adaptable
        if modules == "all" or any(target.matches(ending) for ending in wanted)
    ]
    if chosen and not without:
        return chosen
    asked = "for attention" if modules == "attention" else "that could be adapted"
    if without:
        asked = f"ending with {', '.join(without)}"
    kinds = Counter(f"{one.name.rpartition('.')[2]} ({one.kind})" for one in adaptable)
    available = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(12))
    raise ValueError(
        f"{backbone.arch.name} has no module {asked}. Its linear and convolution layers, by the "
        f"ends of their names: {available or 'none'}. Give modules: all, or a list of such endings"
    )


class AdapterOptions(LayerOptions):
    modules: Literal["attention", "all"] | list[str] = Field(
        "all",
        description="where: attention (query, key and value projections), all weight matrices "
        "(linear, convolution, recurrent and attention layers), or a list of endings of module "
        "names",
    )
    lr_scale: float = Field(
        10.0,
        gt=0,
        description="learning rate of the adapters, relative to lr, which suits whole weights "
        "(Biderman et al. 2024)",
    )


class LoraOptions(AdapterOptions):
    rank: int = Field(8, ge=1, description="rank of the update of each weight")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout of the adapters' input, in training; weights that are computed "
        "(recurrent layers, torch's attention) have none",
    )
    start: Literal["zero", "pissa", "loftq"] = Field(
        "zero",
        description="zero: the update starts at zero; pissa: at the weight's largest singular "
        "values, and the rest of the weight is frozen (Meng et al. 2024); loftq: at the largest "
        "singular values of what the weight loses in 4 bits, so that the network starts nearer "
        "the source's (with quantize; Li et al. 2024)",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the weights of the linear layers that are adapted are held in 4 bits "
        "during training (QLoRA, Dettmers et al. 2023), in an eighth of the memory; other weights, "
        "adapters and the head are in full precision (extra quantized: bitsandbytes)",
    )
    rslora: bool = Field(
        False,
        description="scale by alpha / sqrt(rank), so that high ranks learn as fast (Kalajdzievski "
        "2023)",
    )
    dora: bool = Field(
        False,
        description="train the length of each output's weights apart from their direction (DoRA, "
        "Liu et al. 2024)",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.start == "loftq" and self.quantize is None:
            raise ValueError("start: loftq makes up for what 4 bits lose: set quantize: nf4 too")
        if self.start == "loftq" and self.dora:
            raise ValueError("dora starts from the weight as it is: leave start: loftq out")
        if self.start == "pissa" and self.quantize is not None:
            raise ValueError("start: pissa changes the weight that 4 bits hold: set start: loftq")
        return self


@register("technique", "lora", options=LoraOptions)
class Lora(AdapterTechnique):
    """Low-rank updates of frozen weights (Hu et al. 2022): W + (alpha / rank) B A.

    A (rank, in) starts random, B (out, rank) zero. All layers by default: adapting attention alone
    falls behind full fine-tuning (Dettmers et al. 2023, section 4; Biderman et al. 2024).

    It assumes that the change a target needs has a low rank. It helps on few rows, where it
    regularises, and where memory is short. It hurts where the inputs differ much from the source's
    and rows are many: full fine-tuning then learns more.

    With ``quantize`` (QLoRA) W is held in 4 bits. The network that is tested and saved has the
    rounded weights too. This helps where the backbone would not fit on the GPU. It hurts small
    backbones, which lose time and accuracy and save little. Only linear layers are held in 4 bits.
    """

    def search_space(self):
        return {
            **super().search_space(),
            "rank": (4, 8, 16, 32),
        }

    def weight_of(self, layer):
        weight = super().weight_of(layer)
        if not self.options.dora:
            return weight
        # no gradient goes through the length of the direction (Liu et al. 2024, section 4.3)
        length = weight.detach().norm(dim=1)
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        return (magnitude / length)[:, None] * weight

    def replaces(self, backbone, target):
        # PiSSA takes singular values of matrices
        kinds = self.replaced if self.options.start == "pissa" else (*self.replaced, *CONVOLUTIONS)
        return target.kind in kinds and super().replaces(
            backbone, target._replace(kind=self.replaced[0])
        )

    def check_library(self):
        if self.options.quantize:
            four_bit.library()

    def chosen(self, backbone):
        """Raises ValueError also where there is no layer to hold in 4 bits."""
        chosen = super().chosen(backbone)
        replaced = [one.module for one in chosen if self.replaces(backbone, one)]
        is_held = any(self.is_held_in_4_bits(backbone.get_submodule(name)) for name in replaced)
        if self.options.quantize and not is_held:
            raise ValueError(
                f"quantize: {backbone.arch.name} has no linear layer among the modules that are "
                "adapted, and only those are held in 4 bits: leave quantize out"
            )
        return chosen

    def is_held_in_4_bits(self, module):
        is_linear = type(module).__name__ in AdapterTechnique.replaced
        # two values share a byte
        is_even = is_linear and _matrix_of(module).numel() % 2 == 0
        return bool(self.options.quantize) and is_even

    @torch.no_grad()
    def start_adapter(self, layer, weight):
        if self.options.start != "loftq":
            return
        rank = self.options.rank
        left, right = _largest_factors(weight - layer.base_layer.weight, rank)
        for _ in range(LOFTQ_ROUNDS - 1):
            layer.base_layer = four_bit.FourBitLinear(weight - left @ right, layer.base_layer.bias)
            left, right = _largest_factors(weight - layer.base_layer.weight, rank)
        count = len(right)  # a small layer has fewer singular values than the adapter has rows
        scale = layer.scaling[ADAPTER] ** 0.5
        layer.lora_A[ADAPTER].weight[:count] = right / scale
        layer.lora_B[ADAPTER].weight[:, :count] = left / scale

    def settings(self, is_transposed):
        from peft import LoraConfig, LoraModel

        o = self.options
        return LoraModel, LoraConfig(
            r=o.rank,
            lora_alpha=o.alpha,
            lora_dropout=o.dropout,
            init_lora_weights="pissa" if o.start == "pissa" else True,
            use_rslora=o.rslora,
            use_dora=o.dora,  # type: ignore[arg-type]
            fan_in_fan_out=is_transposed,
        )


LOFTQ_ROUNDS = 5
"""How often the 4 bits and the adapter are fitted to what the other leaves (Li et al. 2024)."""


def _largest_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (rows, rank) and (rank, columns), whose product is the nearest of this rank."""
    u, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vectors[:rank]


CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv2dSame")
"""Convolutions that peft replaces for LoRA. Conv2dSame is timm's, of the efficientnets from
TensorFlow: it pads and convolves.
"""


@register("technique", "ia3", options=AdapterOptions)
class IA3(AdapterTechnique):
    """Scale the outputs of frozen layers by learned vectors, which start at 1 (Liu et al. 2022).

    The paper scales keys, values and the inner layer of the feed-forward parts. Here every layer
    that ``modules`` names is scaled. Where its weight is computed (convolutions, recurrent layers,
    torch's attention), that alone is scaled, and the bias stays.

    It assumes that the source's features need only be turned up or down. It helps on very few rows,
    and costs the fewest parameters. It hurts where features must be mixed anew.
    """

    def weight_of(self, layer):
        return layer.base_layer.weight * layer.ia3_l[ADAPTER]

    def settings(self, is_transposed):
        from peft import IA3Config, IA3Model

        return IA3Model, IA3Config(feedforward_modules=[], fan_in_fan_out=is_transposed)


class VeraOptions(AdapterOptions):
    rank: int = Field(256, ge=1, description="rank of the random matrices that all layers share")


@register("technique", "vera", options=VeraOptions)
class Vera(AdapterTechnique):
    """Low-rank updates by two random matrices that all layers share and that are not trained, and
    two learned vectors for each layer (Kopiczko et al. 2024).

    It assumes what LoRA does, with a tenth of its parameters. It helps where many adapters of one
    backbone are kept. It hurts where a layer's update needs directions that the random matrices
    lack.
    """

    def search_space(self):
        return {
            **super().search_space(),
            "rank": (64, 128, 256),
        }

    def settings(self, is_transposed):
        from peft import VeraConfig, VeraModel

        # from torch's generator, as other random numbers of techniques
        key = int(torch.randint(2**31, ()))
        return VeraModel, VeraConfig(
            r=self.options.rank, projection_prng_key=key, fan_in_fan_out=is_transposed
        )


class OFTOptions(AdapterOptions):
    block: int = Field(
        32,
        ge=2,
        description="inputs that are rotated together; the nearest divisor of a layer's inputs",
    )


@register("technique", "oft", options=OFTOptions)
class OFT(AdapterTechnique):
    """Rotate the inputs of frozen layers: W R, with R orthogonal and block-diagonal (Qiu et al.
    2023).

    Rotations keep angles and lengths of a layer's weights. It assumes that these carry what the
    source knows. It helps where full fine-tuning forgets it, on few rows. It hurts where the scale
    of features must change. A layer with a single input stays as it is.

    BOFT (Liu et al. 2024), whose butterfly factors mix the blocks, is not available here: peft
    computes them by a CUDA extension that it compiles at run time; without it BOFT is plain OFT.
    """

    # peft 0.21 takes an input of four dimensions, as swin's linear layers have, for an image
    replaced = ()

    def weight_of(self, layer):
        rotation, weight = layer.oft_R[ADAPTER], layer.base_layer.weight
        # the transposed rotation is that of the negated angles
        blocks = rotation._cayley_batch(
            -rotation.weight, rotation.block_size, use_cayley_neumann=False
        )
        rotated = torch.einsum("orb,rbc->orc", weight.unflatten(1, (len(blocks), -1)), blocks)
        return rotated.flatten(1)

    def search_space(self):
        return {
            **super().search_space(),
            "block": (16, 32, 64),
        }

    def settings(self, is_transposed):
        from peft import OFTConfig, OFTModel

        return OFTModel, OFTConfig(r=0, oft_block_size=self.options.block, use_cayley_neumann=False)


class LohaOptions(AdapterOptions):
    rank: int = Field(8, ge=1, description="rank of each of the two factors")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


@register("technique", "loha", options=LohaOptions)
class Loha(AdapterTechnique):
    """Updates that are the elementwise product of two low-rank ones, so of rank up to ``rank``
    squared (Hyeon-Woo et al. 2022).

    It assumes what LoRA does, with a higher rank for twice the parameters. It helps where LoRA's
    rank is too small, and hurts where rows are few.
    """

    replaced = ("Linear", "Conv1d", "Conv2d")

    def search_space(self):
        return {
            **super().search_space(),
            "rank": (4, 8, 16, 32),
        }

    def settings(self, is_transposed):
        from peft import LoHaConfig, LoHaModel

        return LoHaModel, LoHaConfig(r=self.options.rank, alpha=self.options.alpha)


class LokrOptions(LohaOptions):
    rank: int = Field(8, ge=1, description="rank of the larger factor")


@register("technique", "lokr", options=LokrOptions)
class Lokr(AdapterTechnique):
    """Updates that are the Kronecker product of a small matrix and a low-rank one (Edalati et al.
    2022; Yeh et al. 2024).

    It assumes that a layer's blocks change alike. It reaches a full rank with fewer parameters than
    LoRA, and helps where there may be only few. It hurts where the blocks need different changes.
    """

    replaced = ("Linear", "Conv1d", "Conv2d")

    def search_space(self):
        return {
            **super().search_space(),
            "rank": (4, 8, 16, 32),
        }

    def settings(self, is_transposed):
        from peft import LoKrConfig, LoKrModel

        return LoKrModel, LoKrConfig(r=self.options.rank, alpha=self.options.alpha)


class AdaLoraOptions(AdapterOptions):
    rank: int = Field(8, ge=1, description="mean rank of the updates at the end")
    start_rank: int = Field(12, ge=1, description="rank of each update at the start")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / start_rank")
    warm_share: float = Field(
        0.1, ge=0, lt=1, description="share of the steps before ranks are reduced"
    )
    final_share: float = Field(
        0.3, ge=0, lt=1, description="share of the steps after the ranks are final"
    )
    orthogonality: float = Field(
        0.1, ge=0, description="weight of the penalty that keeps both factors orthogonal"
    )

    @model_validator(mode="after")
    def _check(self):
        if self.rank > self.start_rank:
            raise ValueError("rank must be at most start_rank: ranks are taken away")
        if self.warm_share + self.final_share >= 1:
            raise ValueError("warm_share and final_share must leave steps between them")
        return self


BETA = 0.85
"""Of the moving averages of importance (Zhang et al. 2023, appendix)."""


class _RankBudget(nn.Module):
    """Which singular values of the updates are kept, by their importance.

    Args:
        layers: peft's layers, with factors A (r, in) and B (out, r) and singular values E (r, 1).
    """

    def __init__(self, layers: list[Any]):
        super().__init__()
        self._layers = [layers]  # in a list: they are modules of the backbone
        for number, layer in enumerate(layers):
            for part, parameter in _factors(layer).items():
                for kind in ("mean", "spread"):
                    self.register_buffer(f"{kind}_{part}{number}", torch.zeros_like(parameter))
            kept = torch.ones(len(layer.lora_E[ADAPTER]), dtype=torch.bool)
            self.register_buffer(f"kept{number}", kept.to(layer.lora_E[ADAPTER].device))

    @torch.no_grad()
    def measure(self) -> None:
        """Average |weight x gradient| and its spread over the steps (equations 8 to 10)."""
        for number, layer in enumerate(self._layers[0]):
            for part, parameter in _factors(layer).items():
                if parameter.grad is None:
                    continue
                mean = self.get_buffer(f"mean_{part}{number}")
                spread = self.get_buffer(f"spread_{part}{number}")
                now = (parameter * parameter.grad).abs().nan_to_num(0.0, 0.0, 0.0)
                mean.lerp_(now, 1 - BETA)
                spread.lerp_((now - mean).abs(), 1 - BETA)

    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keep the ``budget`` most important singular values of all layers."""
        scores = []
        for number in range(len(self._layers[0])):
            importance = {
                part: self.get_buffer(f"mean_{part}{number}")
                * self.get_buffer(f"spread_{part}{number}")
                for part in ("A", "B", "E")
            }
            of_a, of_b = importance["A"].mean(1), importance["B"].mean(0)
            scores.append(importance["E"][:, 0] + of_a + of_b)
        ranked = torch.cat(scores)
        count = len(ranked) - budget
        threshold = ranked.kthvalue(count).values if count else ranked.new_tensor(-torch.inf)
        for number, score in enumerate(scores):
            self.get_buffer(f"kept{number}").copy_(score > threshold)

    @torch.no_grad()
    def apply_to_layers(self) -> None:
        """Set the singular values that are not kept to 0."""
        for number, layer in enumerate(self._layers[0]):
            kept = self.get_buffer(f"kept{number}")
            layer.lora_E[ADAPTER].masked_fill_(~kept[:, None], 0.0)

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Set what a step or an average of weights has moved to 0 again (a forward hook)."""
        self.apply_to_layers()

    def orthogonality(self) -> Tensor:
        """Return the mean of |A A' - 1| and |B' B - 1| (equation 4)."""
        distances = []
        for layer in self._layers[0]:
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            unit = torch.eye(len(a), device=a.device)
            with without_autocast(a):
                distances += [(a @ a.T - unit).norm(), (b.T @ b - unit).norm()]
        return torch.stack(distances).mean()


def _factors(layer: Any) -> dict[str, nn.Parameter]:
    return {
        "A": layer.lora_A[ADAPTER],
        "B": layer.lora_B[ADAPTER],
        "E": layer.lora_E[ADAPTER],
    }


@register("technique", "adalora", options=AdaLoraOptions)
class AdaLora(AdapterTechnique):
    """Low-rank updates B E A whose ranks move to the layers that need them (Zhang et al. 2023).

    All updates start with ``start_rank`` singular values E. In the course of training the least
    important ones of all layers are set to 0, until on average ``rank`` are left in each layer. The
    importance of a singular value and its two vectors is their averaged |weight x gradient|, times
    how much that varies.

    It assumes what LoRA does, and that layers differ in what they must change. It helps where few
    parameters must suffice and runs are long. It hurts in short runs, whose importances are noise,
    and on few rows.
    """

    def settings(self, is_transposed):
        from peft import AdaLoraConfig, AdaLoraModel

        o = self.options
        return AdaLoraModel, AdaLoraConfig(
            init_r=o.start_rank,
            target_r=o.rank,
            lora_alpha=o.alpha,
            fan_in_fan_out=is_transposed,
            total_step=1,  # of peft's own schedule, which needs to know the steps before the run
            tinit=-1,
        )

    def wrap(self, task):
        wrapped = super().wrap(task)
        assert isinstance(wrapped, AdaptedTask)
        names = wrapped.adapters()
        wrapped.budget = _RankBudget([wrapped.backbone.get_submodule(name) for name in names])
        self._hook = wrapped.backbone.register_forward_pre_hook(wrapped.budget.before_forward)
        return wrapped

    def phases(self, steps):
        self._steps = steps
        return super().phases(steps)

    def read_gradients(self, task, phase, step):
        """Measure importances and take ranks away (`ReadsGradients`)."""
        first = round(self.options.warm_share * self._steps)
        last = self._steps - round(self.options.final_share * self._steps)
        if step < last:
            task.budget.measure()
        if first < step <= last:
            task.budget.allocate(self._ranks_left(step, first, last, task))

    def _ranks_left(self, step: int, first: int, last: int, task: AdaptedTask) -> int:
        """Return how many singular values all layers keep at a step (equation 12)."""
        layers, o = len(task.adapters()), self.options
        left = 1 - (step - first) / (last - first)
        return int(layers * (o.start_rank - o.rank) * left**3 + layers * o.rank)

    def penalty(self, task, batch, streams):
        super().penalty(task, batch, streams)
        return self.options.orthogonality * task.budget.orthogonality()

    def finish(self, task):
        self._hook.remove()
        task.budget.apply_to_layers()
        return super().finish(task)
