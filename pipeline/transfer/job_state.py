"""The state that the stages of one command share, and the metadata that a run stores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from pipeline.checkpoints import bundle, pretrained
from pipeline.config.schema import Job, spec_hash
from pipeline.io import checksums, storage
from pipeline.io.json_values import JsonObject
from pipeline.report.code_versions import TrialProvenance
from pipeline.report.source_scores import PairScores, SelectionScore
from pipeline.report.source_summary import SourceSummary
from pipeline.train import source
from pipeline.train.progress import Progress
from pipeline.transfer import grid
from pipeline.transfer.grid import BackboneGroup
from pipeline.transfer.targets import TargetStage


@dataclass
class JobState:
    """State that the stages of one command share."""

    job: Job
    progress: Progress
    verbose: bool = False
    wait: bool | None = None
    """Whether to wait for nodes that have not joined the cluster yet (`launch.cluster`)."""
    remake: tuple[str, ...] = ()
    """"sources", "trials" or both: which results are made again where other code or versions made
    them.
    """
    sources: dict[str, source.SourceStage] = field(default_factory=dict)
    targets: dict[str, TargetStage] = field(default_factory=dict)
    pretraining: list[SourceSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unusable_targets: dict[str, str] = field(default_factory=dict)
    """Targets that could not be prepared, each with the reason. The others continue without them.
    """
    scores: dict[str, SelectionScore] = field(default_factory=dict)
    """Score of each ``source|target``, where sources were chosen by scores."""
    source_scores: dict[str, PairScores] = field(default_factory=dict)
    """All transferability scores of each ``source|target``, where they were computed."""
    num_dropped_test_rows: dict[str, int] = field(default_factory=dict)
    """Number of test rows of each target that were left out because they are also in a source."""
    streamed: list[str] | None = None
    """``target|backbone group`` of those whose rows are not held in memory; None: not known yet."""
    whole_targets: frozenset[str] = frozenset()
    """Targets of a part of a job (``only``) that have all their sources in it, by name in the job.
    """
    ids_in_old_layout: frozenset[str] = frozenset()
    """Ids of the trials that lie where an older version laid them."""
    key: str = ""
    """Hash of everything that the metadata of a run depends on (`save_metadata`)."""
    subgroups: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """For each target with subgroups, the values of its test rows in each subgroup column."""
    cut_by_budget: dict[str, str] = field(default_factory=dict)
    """Why the budget cut a pair, by the id of the pair's last search trial."""
    failed_in_budget: list[str] = field(default_factory=list)
    """Ids of the search trials that failed, and because of which a budget cut their pairs."""
    trial_provenance: dict[str, TrialProvenance] = field(default_factory=dict)
    """Code and versions that made each trial in the table, by trial id."""

    def note(self, line: str, is_warning: bool = False) -> None:
        """Add a line to the notes of the run, and show it."""
        self.notes.append(line)
        self.progress.note(f"warning: {line}" if is_warning else line)


def matching_sources(state: JobState, target: str) -> list[str]:
    """Return the sources that a target is adapted from: those it names, or all of its modality."""
    spec = state.job.targets[target]
    named = spec.sources if spec.sources is not None else list(state.sources)
    return [
        name
        for name in named
        if name in state.sources and _modality_name(state.sources[name]) == spec.data.modality.name
    ]


def _modality_name(stage: source.SourceStage) -> str | None:
    if stage.spec.data is not None:
        return stage.spec.data.modality.name
    if stage.has_bundle:
        return bundle.read_manifest(stage.bundle_uri).modality.name
    # CLIP has two networks: the job says which; `read` refuses one that is not there
    return stage.spec.modality_name or pretrained.modality_name(stage.spec.backbone.name)


def backbone_groups(state: JobState) -> list[BackboneGroup]:
    """Return the sources grouped by backbone and modality (`grid.backbone_groups`).

    Every source must have a bundle.
    """
    manifests = {
        name: bundle.read_manifest(stage.bundle_uri) for name, stage in state.sources.items()
    }
    return grid.backbone_groups(
        {name: (manifest.arch, manifest.modality) for name, manifest in manifests.items()}
    )


def used_places(state: JobState) -> dict[str, tuple[str, ...]]:
    """Return for each source its bundle, and the checkpoint that the source itself started from."""
    return {
        name: tuple(filter(None, (stage.bundle_uri, stage.checkpoint_name)))
        for name, stage in state.sources.items()
    }


def without_other_modalities(state: JobState) -> Job:
    """Return the job without targets that no source matches and sources that no target matches.

    The modality of a checkpoint may be known only after it has been read, so that `Job.selected`
    takes too many. Those that ``only`` names stay.
    """
    job, taken = state.job, {name: set(matching_sources(state, name)) for name in state.job.targets}
    kept = {
        name
        for name, target in job.targets.items()
        if taken[name]
        or job.is_named(name.removesuffix(grid.fold_suffix(target.fold)), target.data.modality.name)
    }
    fitting = set[str]().union(*taken.values())
    sources = {
        name
        for name, stage in state.sources.items()
        if name in fitting or job.is_named(name, _modality_name(stage))
    }
    return job.restricted(sources, kept)


def num_scratch_networks(state: JobState, names: Collection[str]) -> int:
    """Return how many scratch networks sources have: those of one backbone and modality share one.

    Before the sources are trained, they share one where their backbone, rows and modality are the
    same; it may turn out that fewer are needed.
    """
    if all(stage.has_bundle for stage in state.sources.values()):
        return sum(bool(set(group.sources) & set(names)) for group in backbone_groups(state))
    return len({_backbone_kind(state.sources[name]) for name in names})


def _backbone_kind(stage: source.SourceStage) -> tuple[str, ...]:
    """Return a key that sources with the same backbone and rows share."""
    if stage.splits is None or stage.spec.data is None:
        return (str(stage.spec.backbone), stage.spec.init or "")
    return (
        str(stage.spec.backbone),
        stage.spec.init or "",
        str(stage.spec.data.modality),
        spec_hash(source.data_key(stage.spec.data)),
        stage.splits.fingerprint,
    )


class _StoredMetadata(TypedDict, total=False):
    """What a run leaves for later commands and for the report.

    Most fields are those of `JobState`. A run of an older version may lack some.
    """

    key: str
    notes: list[str]
    broken: dict[str, str]
    scores: dict[str, SelectionScore]
    source_scores: dict[str, JsonObject]
    left_out: dict[str, int]
    streamed: list[str]
    failed_in_budget: list[str]
    chosen: dict[str, list[str]]
    """Sources of each target that were fanned out."""


def metadata_uri(state: JobState) -> str:
    """Return the URI of a run's metadata, one file for each part of a job (``only``).

    The file is still called facts.json, as in earlier versions.
    """
    part = f"-{spec_hash(sorted(set(state.job.only)))}" if state.job.only else ""
    return storage.join(state.job.root, f"facts{part}.json")


def save_metadata(state: JobState, chosen: dict[str, set[str]]) -> None:
    """Write what a run leaves for later commands and for the report.

    Args:
        chosen: Sources of each target that were fanned out.
    """
    metadata: _StoredMetadata = {
        "key": state.key,
        "notes": state.notes,
        "broken": state.unusable_targets,
        "scores": state.scores,
        "source_scores": {pair: found.to_json() for pair, found in state.source_scores.items()},
        "left_out": state.num_dropped_test_rows,
        "streamed": state.streamed or [],
        "failed_in_budget": state.failed_in_budget,
        "chosen": {name: sorted(found) for name, found in chosen.items()},
    }
    checksums.write_document(metadata_uri(state), metadata)


def read_metadata(state: JobState) -> _StoredMetadata:
    """Return the metadata that the newest run of the same sources and targets wrote, or {}."""
    remedy = (
        "what it told the report (notes, scores, targets that were left out) is missing until the "
        "job runs again"
    )
    found: Any = checksums.document_or_none(metadata_uri(state), remedy) or {}
    return found if found.get("key") == state.key else {}


def stored_choice(state: JobState) -> dict[str, set[str]] | None:
    """Return the sources of each target as the newest run chose them.

    Returns None where they must still be chosen by scores.
    """
    if state.job.fanout.by_score is None:
        return {name: set(matching_sources(state, name)) for name in state.targets}
    found = read_metadata(state).get("chosen")
    return None if found is None else {name: set(found.get(name, ())) for name in state.targets}
