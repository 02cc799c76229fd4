"""Bundles: the weights (safetensors) that training leaves, and a JSON manifest to use them again.

A bundle is complete or absent: it is written aside, with checksums and the manifest last. Nothing
in it is code.
"""

from __future__ import annotations

import platform
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from pipeline.checkpoints import differences
from pipeline.config import provenance, registry
from pipeline.config.provenance import MadeBy, Provenance
from pipeline.core.contracts import Backbone, Modality, Objective, Task
from pipeline.core.contracts.backbone_capabilities import limits_rows
from pipeline.core.contracts.objective_capabilities import carries_labels, rescales_scores
from pipeline.core.specs import NO_OBJECTIVE, Architecture, ModalitySpec, ObjectiveSpec, Spec
from pipeline.io import atomic_folder, places, s3, storage
from pipeline.io.json_values import JsonObject

FORMAT_VERSION = 2
"""The newest format that is read: 2 is that of a bundle that holds what differs from another one;
whole bundles are written in format 1."""


SpecType = TypeVar("SpecType", bound=Spec)


class BundleError(ValueError):
    """A bundle or checkpoint cannot be used. The message has the reason and what to do."""


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("onetomany", "ray", "numpy", "pyarrow")
    by_package = {}
    for name in packages:
        try:
            by_package[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            by_package[name] = "not installed as a package"
    return {"python": platform.python_version(), **by_package, **provenance.versions()}


def build_modality(spec: ModalitySpec) -> Modality:
    """Build a modality with its fitted state."""
    kind = registry.get("modality", spec.name)
    return kind(kind.options_class(**spec.options), spec.state)


def without_folders(kind: str, spec: SpecType) -> SpecType:
    """Return a component whose options name files alone, not the folders that they lie in.

    Args:
        kind: Of the component, such as ``objective``.
        spec: The component.
    """
    paths = {name: spec.options.get(name) for name in registry.path_options(kind, spec.name)}
    files = {name: posixpath.basename(path.rstrip("/")) for name, path in paths.items() if path}
    return replace(spec, options={**spec.options, **files})


def largest_options(arch: Architecture) -> dict[str, float]:
    """Return the largest values of the modality's options that a backbone reads, by name.

    Empty for backbones without such a limit (`LimitsRows`). In the options' units: ``max_seconds``
    in seconds.
    """
    library, _, architecture = arch.name.partition("/")
    kind = registry.get("model", library)
    options = kind.options_class(**arch.options)
    return kind.largest_options(architecture, options, arch.inputs) if limits_rows(kind) else {}


def limit_modality(spec: ModalitySpec, arch: Architecture) -> tuple[ModalitySpec, str]:
    """Lower the modality's options to what the backbone can read (`largest_options`).

    Returns:
        The modality, and what was lowered, as one sentence, or an empty string.
    """
    largest = largest_options(arch)
    options = registry.get("modality", spec.name).options_class(**spec.options)
    lowered = {name: most for name, most in largest.items() if getattr(options, name) > most}
    if not lowered:
        return spec, ""
    description = ", ".join(
        f"{name} is {most:g} in place of {getattr(options, name):g}"
        for name, most in lowered.items()
    )
    text = f"{description}, since {arch.name} reads no more; longer rows count as bad rows"
    return replace(spec, options={**spec.options, **lowered}), text


def build_backbone(arch: Architecture, seed: int | None = None) -> Backbone:
    """Build a backbone with random weights.

    Args:
        seed: Seed of the weights; None for torch's generator as it is.
    """
    library, _, architecture = arch.name.partition("/")
    kind = registry.get("model", library)
    options = kind.options_class(**arch.options)
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        if seed is not None:
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        return kind(architecture, options, dict(arch.inputs))


def build_task(
    arch: Architecture,
    objective: ObjectiveSpec,
    seed: int | None = None,
    head_seed: int | None = None,
) -> Task:
    """Build a backbone and an objective with random weights.

    Args:
        seed: Seed of the backbone's weights, and of the head's where it has no seed of its own.
        head_seed: Seed of the head's weights.

    Raises:
        ValueError: Backbone and objective do not fit each other.
    """
    if head_seed is None and seed is not None:
        head_seed = seed + 1
    return add_head(build_backbone(arch, seed), objective, head_seed)


def add_head(backbone: Backbone, objective: ObjectiveSpec, seed: int | None = None) -> Task:
    """Build an objective with random weights on a backbone that is there.

    Args:
        seed: Seed of the head's weights; None for torch's generator as it is.

    Raises:
        ValueError: Backbone and objective do not fit each other.
    """
    kind = registry.get("objective", objective.name)
    options = kind.options_class(**objective.options)
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        if seed is not None:
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        return Task(backbone, kind(backbone, options, objective.state))


@dataclass(frozen=True)
class Transfer:
    """Which tensors were loaded, by name."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    changed: tuple[str, ...] = ()
    """Which tensors got another shape, in words."""

    def text(self) -> str:
        """Return the transfer as one line."""

        def part(names: tuple[str, ...]) -> str:
            return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""

        counts = (
            f"{len(self.kept)} tensors kept, {len(self.new)} new{part(self.new)}, "
            f"{len(self.dropped)} dropped{part(self.dropped)}"
        )
        return "; ".join((counts, *self.changed))


def transfer(
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    origin: str,
    ignored_prefixes: tuple[str, ...] = (),
) -> Transfer:
    """Load a backbone strictly: every one of its tensors must be given, with its shape.

    The backbone may convert a tensor to the shape that its input needs
    (``Backbone.convert_checkpoint``); the result says so.

    Args:
        origin: Where the tensors come from, for messages.
        ignored_prefixes: Of tensors that may be left over (a classifier).

    Raises:
        BundleError: Names what is missing, has another shape, or is left over without being in
            ``ignored_prefixes``.
    """
    expected = backbone.state_dict()
    tensors, changed = backbone.convert_checkpoint(dict(tensors))
    shapes = [
        f"{n} is {tuple(tensors[n].shape)} there and {tuple(expected[n].shape)} here"
        for n in expected
        if n in tensors and tensors[n].shape != expected[n].shape
    ]
    missing = [n for n in expected if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in expected]
    not_dropped = (
        [n for n in unexpected if not n.startswith(ignored_prefixes)]
        if ignored_prefixes
        else unexpected
    )
    problems = shapes[:3]
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({', '.join(missing[:4])})")
    if not_dropped:
        problems.append(f"{len(not_dropped)} tensors have no place ({', '.join(not_dropped[:4])})")
    if problems:
        raise BundleError(
            f"{origin} does not fit {backbone.arch.name}: {'; '.join(problems)}. Check the "
            "model's name and its input"
        )
    backbone.load_state_dict({n: t for n, t in tensors.items() if n in expected}, strict=False)
    return Transfer(
        tuple(n for n in expected if n in tensors),
        tuple(n for n in expected if n not in tensors),
        tuple(unexpected),
        tuple(changed),
    )


def carry_head(task: Task, bundle: Bundle) -> str:
    """Load the bundle's head when its labels have the same names, in any order.

    Labels decide, not shapes: a head for other labels is new, and so is one with another option
    ``norm`` (layer norm before the head). One whose labels are letters (`CarriesLabels`) keeps
    those that both have.

    Returns:
        What was done, in words.
    """
    source_objective, objective = bundle.manifest.objective, task.objective
    if source_objective.name != objective.registered_name:
        return (
            f"new head: the objective was {source_objective.name}, now it is "
            f"{objective.registered_name}"
        )
    norm = getattr(objective.options, "norm", None)
    if source_objective.options.get("norm", norm) != norm:
        return "new head: the bundle's head was trained with another value of option norm"
    outcome = load_head(objective, bundle.head_tensors(), source_objective.state.get("labels"))
    if (
        outcome.startswith("head kept")
        and rescales_scores(objective)
        and source_objective.state != objective.state
    ):
        objective.take_scale_of(source_objective.state)
    return outcome


OF_LABELS = ("head.weight", "head.bias")
"""Tensors of a head that have one row a label."""


def load_head(
    objective: Objective, tensors: Mapping[str, Tensor], labels: Sequence[str] | None
) -> str:
    """Load a head whose tensors have the objective's own names, by the rules of `carry_head`.

    Args:
        labels: What the tensors stand for.

    Returns:
        What was done, in words.
    """
    own = objective.state_dict()
    old, new = labels, objective.state.get("labels")
    if old is None or new is None or list(old) == list(new):
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in own.items()}:
            return "new head: its options differ"
        objective.load_state_dict(dict(tensors))
        objective.names_taken_over = frozenset(tensors)
        return "head kept: the same labels"
    if any(len(set(labels)) < len(labels) for labels in (old, new)):  # ImageNet has two cranes
        return "new head: two labels have the same name, so its rows cannot be matched to labels"
    differ = sorted(set(old) ^ set(new))
    shared = [label for label in new if label in old]
    names = f"{len(differ)} names, e.g. {', '.join(map(str, differ[:4]))}"
    if differ and not (shared and carries_labels(objective)):
        return f"new head: its labels differ from these ({names})"
    rows = {n for n in OF_LABELS if n in tensors and n in own}
    rest = {n: t.shape for n, t in tensors.items() if n not in rows}
    if rest != {n: t.shape for n, t in own.items() if n not in rows} or any(
        tensors[n].shape[1:] != own[n].shape[1:] for n in rows
    ):
        return "new head: its options differ"
    if not rows or any(shape and shape[0] == len(old) for shape in rest.values()):
        why = f"differ from these ({names})" if differ else "are in another order"
        return f"new head: its labels {why}"
    there = [old.index(label) for label in shared]
    here = torch.tensor([new.index(label) for label in shared])
    carried: dict[str, Tensor] = {}
    for name in rows:
        rows_of_labels = tensors[name][there].to(own[name])
        carried[name] = own[name].index_copy(0, here, rows_of_labels)
    objective.load_state_dict({**tensors, **carried})
    if not differ:
        objective.names_taken_over = frozenset(tensors)
        return "head kept: the same labels, put into their new order"
    objective.names_taken_over = frozenset(rest)
    return (
        f"head kept for {len(shared)} of {len(new)} labels; the rows of the others are new (labels "
        f"that only one of both has: {names})"
    )


def carry_tensors(
    objective: Any, source_objective: ObjectiveSpec, tensors: Mapping[str, Tensor]
) -> tuple[int, str]:
    """Load the tensors of a source's head that have the same name, shape and meaning.

    See `TransfersHead`.

    Args:
        source_objective: The source's objective.

    Returns:
        How many tensors were loaded, and what was done in words.
    """
    if source_objective.name != objective.registered_name:
        return 0, f"new head: the source's objective was {source_objective.name}"
    expected = objective.state_dict()
    kept = {
        n: t
        for n, t in tensors.items()
        if n in expected
        and expected[n].shape == t.shape
        and objective.is_transferable(source_objective.options, n)
    }
    objective.load_state_dict(kept, strict=False)
    objective.names_taken_over = frozenset(kept)
    description = Transfer(
        tuple(kept),
        tuple(n for n in expected if n not in kept),
        tuple(n for n in tensors if n not in kept),
    )
    return len(kept), f"head: {description.text()}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself: what rebuilds its network and its rows, where it comes from,
    and how it was trained.

    ``base`` names, by its place and the SHA-256 of its weights, the bundle that is needed to read
    this one; None for a bundle that holds all weights. ``training`` holds what the run reported of
    itself, ``metrics`` the validation metrics, ``columns`` the column of each role, ``made_by`` the
    hashes of the code that made it (`pipeline.config.provenance`), ``files`` and ``sha256`` the
    checksums of its folder. ``technique`` is the one whose modules are part of the network, with
    its options, if any.
    """

    arch: Architecture
    modality: ModalitySpec
    objective: ObjectiveSpec
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    parent: str | None = None
    base: dict[str, str] | None = None
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    spec_hash: str = ""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    columns: dict[str, str] = field(default_factory=dict[str, str])
    technique: Spec | None = None
    made_by: MadeBy | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    sha256: str = ""

    @property
    def made(self) -> Provenance | None:
        """Code and versions that made it; None where they were not recorded."""
        return provenance.from_metadata({"made_by": self.made_by, "versions": self.versions})

    @property
    def has_head(self) -> bool:
        """Whether it holds an objective: the bundle of an imported checkpoint may have none."""
        return self.objective.name != NO_OBJECTIVE.name

    def build_modality(self) -> Modality:
        """Return the modality as it was fitted, for rows that the backbone can read."""
        return build_modality(limit_modality(self.modality, self.arch)[0])

    def to_publish(self) -> Manifest:
        """Return the manifest of a whole bundle, without paths of this machine."""
        return replace(
            self,
            modality=without_folders("modality", self.modality),
            objective=without_folders("objective", self.objective),
            base=None,
            parent=None if self.parent is None else places.without_places(self.parent),
            training=places.json_without_places(self.training),
        )

    def to_json(self) -> JsonObject:
        """The manifest as its folder's JSON, without the checksums, which writing the folder
        adds.
        """
        content = {declared.name: getattr(self, declared.name) for declared in fields(self)}
        del content["files"], content["sha256"]
        version = 2  # programs that read format 1 alone know no base
        if self.base is None:
            del content["base"]
            version = 1
        parts = {name: part.to_json() for name, part in content.items() if isinstance(part, Spec)}
        return {"format_version": version, "kind": "bundle", **content, **parts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Read the JSON of a bundle's folder. Raises ValueError where it is none, or one of a newer
        format.
        """
        version = content.get("format_version")
        if content.get("kind") != "bundle" or not isinstance(version, int):
            raise ValueError("this folder is not a bundle")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the bundle has format {version}, this program reads up to {FORMAT_VERSION}; "
                "update onetomany"
            )
        stated: dict[str, Any] = {
            declared.name: content[declared.name]
            for declared in fields(cls)
            if content.get(declared.name) is not None
        }
        stated["arch"] = Architecture.from_json(content.get("arch"))
        stated["modality"] = ModalitySpec.from_json(content.get("modality"))
        stated["objective"] = ObjectiveSpec.from_json(content.get("objective"))
        if "technique" in stated:
            stated["technique"] = Spec.from_json(stated["technique"])
        return cls(**stated)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: its place, manifest and tensors."""

    uri: str
    manifest: Manifest
    tensors: dict[str, Tensor]

    def task(self) -> Task:
        """Return backbone and objective with these weights, in evaluation mode.

        Raises:
            BundleError: The bundle holds a backbone alone.
        """
        if not self.manifest.has_head:
            raise BundleError(
                f"{self.uri}: this bundle is a backbone without a head; fine-tune it first"
            )
        task = build_task(self.manifest.arch, self.manifest.objective)
        if self.manifest.technique is not None:
            kind = registry.get("technique", self.manifest.technique.name)
            task = kind(kind.options_class(**self.manifest.technique.options)).wrap(task)
        task.load_state_dict(self.tensors)
        return task.eval()

    def backbone(self) -> Backbone:
        """Return the backbone, with a technique's modules where these are part of it.

        Raises BundleError where the tensors are not its own.
        """
        if self.manifest.technique is not None:
            return self.task().backbone
        backbone = build_backbone(self.manifest.arch)
        transfer(backbone, self.backbone_tensors(), self.uri)
        return backbone.eval()

    def modality(self) -> Modality:
        """Return the modality as it was fitted, for rows that the backbone can read."""
        return self.manifest.build_modality()

    def backbone_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the backbone under its own names."""
        return self._below("backbone.")

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the head under its own names."""
        return self._below("objective.")

    def _below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, without it."""
        below = [(name, tensor) for name, tensor in self.tensors.items() if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in below}


@dataclass(frozen=True)
class Base:
    """A bundle that another one may be written as the difference to."""

    uri: str
    sha256: str
    """SHA-256 of its weights."""
    backbone: Mapping[str, Tensor]
    """Its backbone, under its own names."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the backbone's tensors under the names of a task."""
        return {f"backbone.{name}": tensor for name, tensor in self.backbone.items()}


def save(
    uri: str,
    model: Task | Backbone,
    modality: ModalitySpec,
    base: Base | None = None,
    **extra: Any,
) -> None:
    """Write a bundle of a task, or of a backbone alone (an imported checkpoint).

    Args:
        base: Write what differs from this bundle, and name it; None: all weights.
        extra: Further fields of its `Manifest`.
    """
    if base is not None:
        extra["base"] = {"uri": base.uri, "sha256": base.sha256}
    backbone = model.backbone if isinstance(model, Task) else model
    objective = NO_OBJECTIVE
    if isinstance(model, Task):
        head = model.objective
        objective = ObjectiveSpec(head.registered_name, head.options.model_dump(), head.state)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(backbone.arch, modality, objective, created, versions(), **extra)
    prefix = "" if isinstance(model, Task) else "backbone."
    tensors = {
        prefix + name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    if base is not None:
        tensors = differences.reduce(tensors, base.tensors())
    with storage.scratch_folder() as scratch:
        path = Path(scratch, "weights.safetensors")
        with s3.naming("write", path):
            save_file(tensors, path)
        atomic_folder.commit_folder(uri, {"weights.safetensors": path}, manifest.to_json())


def exists(uri: str) -> bool:
    """Return whether there is a bundle."""
    return storage.exists(storage.join(uri, "manifest.json"))


def weights_sha256(uri: str) -> str:
    """Return the SHA-256 of a bundle's weights, from its manifest.

    Two bundles with the same one hold the same tensors.
    """
    return read_manifest(uri).files["weights.safetensors"]["sha256"]


def read_manifest(uri: str) -> Manifest:
    """The manifest of a bundle, its own checksum verified. Raises BundleError for a newer format,
    StorageError for a missing or damaged one.
    """
    content = atomic_folder.open_folder(uri)
    try:
        return Manifest.from_json(content)
    except ValueError as error:
        raise BundleError(f"{uri}: {error}") from None


def load(uri: str) -> Bundle:
    """Read a bundle and verify it.

    Raises:
        BundleError: The folder is no bundle, or has a newer format.
        StorageError: The bundle is missing or damaged.
    """
    manifest = read_manifest(uri)
    with storage.scratch_folder() as scratch:
        folder = atomic_folder.fetch_folder(uri, Path(scratch, "bundle"))
        tensors = load_file(Path(folder, "weights.safetensors"))
    if manifest.base is not None:
        tensors = differences.restore(tensors, _read_base(uri, manifest.base).tensors())
    return Bundle(uri, manifest, tensors)


def _read_base(uri: str, named: Mapping[str, str]) -> Base:
    """Read the bundle that another one is the difference to.

    Raises:
        BundleError: It is missing, or has other weights than it had.
    """
    place = _place_of_base(uri, named)
    try:
        sha256 = weights_sha256(place)
    except storage.NotFoundError as error:
        raise BundleError(
            f"{uri} holds what differs from {place}, which is gone: {error}; restore it"
        ) from error
    if sha256 != named["sha256"]:
        raise BundleError(
            f"{uri} holds what differs from {place}, whose weights have changed since: restore them"
        )
    return Base(place, sha256, load(place).backbone_tensors())


def _place_of_base(uri: str, named: Mapping[str, str]) -> str:
    """Return the URI of the bundle that holds a bundle's base weights.

    Usually that is where they were. If the job's folder was moved or copied, it is the source's
    bundle in the folder that is read, provided that its weights are the same.
    """
    job_folder, is_of_trial, _ = storage.absolute(uri).rpartition("/trials/")
    recorded = named["uri"]
    source_folder = re.search(r"/(sources/[^/]+/bundle)/?$", recorded)
    if not is_of_trial or source_folder is None:
        return recorded
    moved = storage.join(job_folder, source_folder[1])
    is_same = exists(moved) and weights_sha256(moved) == named["sha256"]
    return moved if is_same else recorded
