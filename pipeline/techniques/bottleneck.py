"""Bottleneck adapters: small trainable modules inside a frozen backbone (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Backbone, Task, Technique
from pipeline.core.nn.called_modules import CalledModules
from pipeline.core.nn.filter_maps import change_filters, filter_counts
from pipeline.core.nn.norms import norm_parameters

ADAPTER = "bottleneck"
"""Name of an adapter in the module that it stands behind."""
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class BottleneckOptions(LayerOptions):
    width: int = Field(64, ge=1, description="hidden units of each adapter")
    activation: Literal["relu", "gelu"] = Field(
        "relu", description="between the two projections of an adapter"
    )
    modules: Literal["last", "all"] | list[str] = Field(
        "last",
        description="where adapters are added: last: behind the last weight matrix, convolution, "
        "recurrent or attention layer of each layer (Pfeiffer et al. 2021); all: behind all of "
        "them; or a list of endings of module names, such as [attention.output.dense, "
        "output.dense] of bert (Houlsby et al. 2019)",
    )
    norms: bool = Field(
        False,
        description="whether scale and shift of the norms are trained too, as in Houlsby et al.",
    )
    lr_scale: float = Field(
        10.0,
        gt=0,
        description="learning rate of the adapters and norms, relative to lr, which suits whole "
        "weights",
    )


class Adapter(nn.Module):
    """x + up(activation(down(x))) of the last dimension; it starts as x.

    Args:
        filters: Size of the last dimension.
        width: Hidden units.
        activation: One of ``ACTIVATIONS``.
    """

    def __init__(self, filters: int, width: int, activation: str):
        super().__init__()
        self.down, self.up = nn.Linear(filters, width), nn.Linear(width, filters)
        self.activation = ACTIVATIONS[activation]()
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.activation(self.down(x)))


class BottleneckTask(Task):
    """A task whose backbone holds adapters, each inside the module that it stands behind.

    Its layers are those of the plain task, each followed by the adapters inside it, and by its
    norms where these train. The adapters' weights are drawn from torch's generator.

    Args:
        task: The plain task; its backbone is changed in place.
        options: Of the technique.

    Raises:
        ValueError: the backbone lacks the modules that are named.
    """

    def __init__(self, task: Task, options: BottleneckOptions):
        super().__init__(task.backbone, task.objective)
        layers = task.layers()
        named = dict(task.named_parameters())
        owner = {id(named[name]): layer for layer, names in layers.items() for name in names}
        norms = {f"backbone.{name}" for name in norm_parameters(task.backbone)}
        norms = norms if options.norms else set[str]()
        added: dict[str, list[str]] = {layer: [] for layer in layers}
        self.places = _places(task.backbone, options.modules)
        for name, filters in self.places.items():
            module = task.backbone.get_submodule(name)
            layer = owner[id(next(module.parameters()))]
            adapter = Adapter(filters, options.width, options.activation)
            module.add_module(ADAPTER, adapter)
            module.register_forward_hook(_apply_adapter)
            added[layer] += [f"backbone.{name}.{ADAPTER}.{one}" for one in adapter.state_dict()]
        self.calls = CalledModules(task.backbone, self.places)
        self._layers: dict[str, list[str]] = {}
        for layer, names in layers.items():
            self._layers[layer] = [name for name in names if name not in norms]
            parts = {
                "adapters": added[layer],
                "norms": [name for name in names if name in norms],
            }
            self._layers |= {f"{layer}/{part}": own for part, own in parts.items() if own}

    def layers(self) -> dict[str, list[str]]:
        return {layer: list(names) for layer, names in self._layers.items()}


def _apply_adapter(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Send a module's output through its adapter (a forward hook)."""
    return change_filters(module, output, module.get_submodule(ADAPTER))


def _ending(names: Iterable[str]) -> str:
    """Return the endings of names, to be named in the option ``modules``."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "..."


def _places(backbone: Backbone, modules: str | list[str]) -> dict[str, int]:
    """Return the modules behind which adapters stand, and how many filters each has.

    Raises ValueError where there are none, or none with one of the endings that are named.
    """
    counts = filter_counts(backbone)
    # torch's attention reads the weights of its parts
    inside = tuple(
        f"{name}."
        for name, module in backbone.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )
    counts = {name: filters for name, filters in counts.items() if not name.startswith(inside)}
    endings = modules if isinstance(modules, list) else [""]
    without = [one for one in endings if not any(_ends(name, one) for name in counts)]
    if without:
        asked = f"ending with {', '.join(without)}" if isinstance(modules, list) else "with filters"
        raise ValueError(
            f"bottleneck: {backbone.arch.name} has no module {asked}. Its linear, convolution, "
            f"recurrent and attention layers end with: {_ending(counts)}"
        )
    if modules != "last":
        chosen = (name for name in counts if any(_ends(name, one) for one in endings))
        return {name: counts[name] for name in chosen}
    named = dict(backbone.named_parameters())
    layers = backbone.layers().items()
    owner = {id(named[name]): layer for layer, names in layers for name in names}
    last = {owner[id(next(backbone.get_submodule(name).parameters()))]: name for name in counts}
    return {name: counts[name] for name in last.values()}


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}" if ending else "")


@register("technique", "bottleneck", options=BottleneckOptions)
class BottleneckAdapters(Technique):
    """Train small residual modules behind the layers of a frozen backbone, and the head.

    An adapter is a projection to ``width``, an activation and a projection back. It reads a layer's
    output and is added to it (Houlsby et al. 2019). The last projection starts as zeros, so the
    network starts as the source's. By default there is one adapter behind the last weight matrix
    (convolution, recurrent or attention layer) of each layer, in the order in which the backbone
    lists them. In a transformer this is behind the feed-forward part of a block (Pfeiffer et al.
    2021). Houlsby et al. put a second one behind the attention, and train the norms too.

    It assumes that the source's layers are good and need a correction that depends on the input. It
    helps on few rows, where it regularises; unlike LoRA's, its updates are not linear. It hurts
    where inputs differ much and rows are many: full fine-tuning then learns more.

    It cannot be merged into the weights, so the network is slower in use. ``predict`` reads its
    bundle, but the bundle cannot be the source of another job.
    """

    keeps_modules = True

    def wrap(self, task):
        """Raises ValueError where the backbone lacks the modules that are named."""
        return BottleneckTask(task, self.options)

    def search_space(self):
        return {"lr": (0.1, 10.0), "lr_scale": (1.0, 100.0), "width": (8, 64, 256)}

    def rates(self, layers, phase):
        return {
            name: self.options.lr_scale if "/" in name else float(name == "head") for name in layers
        }

    def penalty(self, task, batch, streams):
        """Add nothing; see in the first batch whether each adapter is called."""
        if isinstance(task, BottleneckTask) and len(batch):
            task.calls.check(task.backbone.arch.name)
        return None
