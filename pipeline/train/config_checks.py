"""Check settings of sources and targets against each other, before any row is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import registry
from pipeline.config.registry import LayerOptions
from pipeline.config.schema import CHECKPOINT_PREFIXES, Data, Source, Train
from pipeline.core.capabilities import (
    can_pack,
    check_roles,
    decodes_on_device,
    ineffective_options,
    is_costed,
    makes_views,
)
from pipeline.core.contracts import Objective, Technique, layer_rates, trains
from pipeline.core.contracts.objective_capabilities import (
    compares_views,
    couples_rows,
    keeps_trained_backbone,
    replaces_backbone,
)
from pipeline.core.contracts.technique_capabilities import (
    AddsModules,
    averages_weights,
    keeps_modules,
    reads_source,
)
from pipeline.train.experiment import technique_of


def check_source(place: str, spec: Source) -> None:
    """Raise ValueError for settings of a source with data that contradict each other."""
    assert spec.data is not None and spec.objective is not None
    modality = registry.get("modality", spec.data.modality.name)
    objective = registry.get("objective", spec.objective.name)
    # a checkpoint may have options of its own: `fit_modality` checks when it is read
    problem = ineffective_options(modality, spec.data.modality.options)
    if problem and not _continues(spec):
        raise ValueError(f"{place}.data.modality: {problem}")
    check_modality(place, spec.data.modality.name, spec.data.modality.options, spec.objective.name)
    if objective.packed:
        check_packed(place, spec.data, spec.objective.name)
    check_costs(place, spec.data, spec.train, objective)
    check_technique(place, spec)
    check_averages(place, spec)
    if couples_rows(objective) and spec.train.micro_batch is not None:
        raise ValueError(
            f"{place}.train.micro_batch: the loss of {spec.objective.name} is that of a whole "
            "global batch, which parts of it would not give; leave it out, and use more workers, "
            "or a smaller global_batch or batch_cost"
        )
    if compares_views(objective) and not makes_views(modality):
        raise ValueError(
            f"{place}.objective: {spec.objective.name} compares random views of a row, and "
            f"{spec.data.modality.name} rows have none; it is for images"
        )
    is_keep_stated = "keep" in spec.train.model_fields_set
    if couples_rows(objective) and spec.train.keep == "best" and is_keep_stated:
        raise ValueError(
            f"{place}.train.keep: the validation loss of {spec.objective.name} says little about "
            "the backbone, since its teacher, codes or distractors change during training; leave "
            "it out: the last weights are kept"
        )
    if spec.data.decode == "device" and not decodes_on_device(modality):
        raise ValueError(
            f"{place}.data.decode: {spec.data.modality.name} rows are not decoded on the "
            "device; use workers, train, memory or auto"
        )


def check_modality(place: str, name: str, options: dict[str, Any], objective: str) -> None:
    """Raise ValueError where a modality's options do not fit the objective."""
    kind = registry.get("modality", name)
    try:
        modality = kind(kind.options_class(**options), {})
        check_roles(modality, registry.get("objective", objective).roles)
    except ValueError as error:
        raise ValueError(f"{place}.data.modality: {error}") from None


def check_packed(place: str, data: Data, objective: str) -> None:
    """Raise ValueError where rows cannot be packed, or have more than one text."""
    kind = registry.get("modality", data.modality.name)
    optional_roles: tuple[str, ...] = kind.optional_roles
    if not can_pack(kind):
        able = names_with("modality", can_pack)
        raise ValueError(
            f"{place}.objective: {objective} reads packed documents, and {data.modality.name} "
            f"rows cannot be packed: it is for {', '.join(able)}"
        )
    for role in optional_roles:
        if role in data.columns:
            raise ValueError(
                f"{place}.data.columns.{role}: {objective} reads one text a row, packed with "
                f"others: leave {role} out, or write both texts into one column"
            )


def check_costs(place: str, data: Data, train: Train, objective: type[Objective]) -> None:
    """Raise ValueError where batches cannot be cut by the cost of rows."""
    if train.batch_cost is None:
        return
    able = names_with("modality", is_costed)
    why = ""
    if data.modality.name not in able or objective.packed:
        why = f"rows of {data.modality.name} all cost the same here (it is for {', '.join(able)})"
    elif any(weight is not None for weight in data.weights):
        why = "corpora with weights are drawn row by row"
    if why:
        raise ValueError(f"{place}.train.batch_cost: {why}; use global_batch")


def check_technique(place: str, spec: Source) -> None:
    """Raise ValueError for a technique that makes no sense for a source."""
    assert spec.objective is not None
    technique = technique_of(spec.technique)
    name, where = spec.technique.name, f"{place}.technique"
    if not trains(technique):
        raise ValueError(
            f"{where}: {name} trains nothing; a source without data already is its checkpoint"
        )
    if technique.starts_from != "source":
        raise ValueError(
            f"{where}: {name} starts from random weights; so does every source that names no "
            "checkpoint: leave the technique out"
        )
    if not _continues(spec) and _freezes_backbone(technique):
        raise ValueError(
            f"{where}: {name} freezes backbone weights, which are random here; "
            "name a checkpoint to continue from (init), or leave the technique out"
        )
    if technique.streams():
        raise ValueError(
            f"{where}: {name} reads rows of a source and of a target; it is for targets"
        )
    if reads_source(technique):
        raise ValueError(f"{where}: {name} reads the network of a source; it is for targets")
    if keeps_modules(technique):
        raise ValueError(
            f"{where}: {name} adds modules that stay, and no target could start from these: "
            "it is for targets"
        )
    objective = registry.get("objective", spec.objective.name)
    if isinstance(technique, AddsModules) and replaces_backbone(objective):
        raise ValueError(
            f"{where}: {name} adds modules to the backbone, and {spec.objective.name} copies "
            "weights to and from a backbone without them; use full"
        )


def check_averages(place: str, spec: Source) -> None:
    """Raise ValueError where the averaged weights would be replaced by those of a teacher."""
    assert spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    if keeps_trained_backbone(objective, options):
        return
    reason = (
        f"the bundle of {spec.objective.name} holds another backbone (its teacher's) than the one "
        "whose weights are averaged"
    )
    if spec.train.ema is not None:
        raise ValueError(f"{place}.train.ema: {reason}: leave it out")
    if averages_weights(technique_of(spec.technique)):
        raise ValueError(f"{place}.technique: {reason}: use full")


def _continues(spec: Source) -> bool:
    """Whether a source starts from a checkpoint."""
    return spec.init is not None or spec.backbone.name.startswith(CHECKPOINT_PREFIXES)


def _freezes_backbone(technique: Technique) -> bool:
    """Whether a layer of the backbone is frozen in some phase."""
    layers = {"backbone": ["backbone.weight"], "head": ["objective.weight"]}
    if isinstance(technique.options, LayerOptions) and technique.options.freeze is not None:
        return True
    phases = technique.phases(100)
    return any(layer_rates(technique, layers, phase.name)["backbone"] == 0 for phase in phases)


def names_with(kind: str, capability: Callable[[Any], bool]) -> list[str]:
    """Return the names of the registered components of a kind that have a capability."""
    return [name for name in registry.names(kind) if capability(registry.get(kind, name))]
