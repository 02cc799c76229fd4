"""Checks of a sample of the rows before any training: unread texts, missing labels and names.

Each finding is a sentence for the terminal, the report and ``--dry-run``; some are warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.registry import BoxOptions
from pipeline.config.schema import ComponentConfig
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import floats
from pipeline.core.capabilities import (
    ComparesFeatureNames,
    CountsUnreadText,
    UnreadText,
    check_known_share,
    columns_of,
)
from pipeline.core.contracts import Modality, Objective
from pipeline.core.contracts.objective_capabilities import AllowsNullLabels
from pipeline.core.specs import ModalitySpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.train import fit_components

SAMPLE_ROWS, SAMPLE_BYTES = 2048, 4 << 20
"""Rows of the sample of a split, since counting the tokens of all rows takes long; fewer where they
take more bytes in Parquet, uncompressed.
"""
FEWEST_ROWS = 16
SAMPLE_MASKS = 64
"""Masks that are opened; most often the first one holds two classes, and no other is read."""
SAMPLE_IMAGES = 8
"""Images that are opened."""
WARN_SHARE = 0.01
"""From this share of unread words or tokens of a split on, a finding is a warning."""

LEAST_KNOWN = 0.1
"""There is a warning where a source knows a smaller share of a target's values."""


class Finding(NamedTuple):
    """An observation on the rows, as one sentence."""

    text: str
    is_warning: bool = False
    in_terminal: bool = True
    """Whether the terminal shows it too; the report has all findings."""

    def line(self, name: str) -> str:
        """Return the sentence with the name of its source or target."""
        return f"{'warning: ' if self.is_warning else ''}{name}: {self.text}"


def findings_from_metadata(metadata: Mapping[str, Any]) -> list[Finding]:
    """Return the findings in the metadata of a source's bundle: lists of a Finding's fields.

    Bundles of imported checkpoints of an earlier version have the sentence alone.
    """
    findings = []
    for fields in metadata.get("findings", ()):
        findings.append(Finding(fields) if isinstance(fields, str) else Finding(*fields))
    return findings


LENGTH_ADVICE = "raise data.modality.text.length, or cut the texts into rows"


def text_findings(
    modality: Modality,
    selections: dict[str, Selection],
    columns: dict[str, str],
    packed: bool,
    length_advice: str = LENGTH_ADVICE,
) -> list[Finding]:
    """Return findings on the share of texts that is cut, or that the tokenizer does not know.

    Args:
        selections: The rows, by the name of their split.
        packed: Whether documents are packed into rows, so that nothing is cut.
        length_advice: What to do where much is cut.
    """
    if not isinstance(modality, CountsUnreadText):
        return []
    cut: list[str] = []
    unknown: list[str] = []
    largest_cut = largest_unknown = 0.0
    unit = "tokens"
    for name, selection in selections.items():
        unread, rows = _unread_text(modality, selection, columns)
        if unread is None:
            continue
        unit = unread.unit
        largest_unknown = max(largest_unknown, unread.unknown)
        unknown.append(f"{name} {100 * unread.unknown:.1f} %")
        if packed or not unread.lost:
            continue
        largest_cut = max(largest_cut, unread.share)
        estimated = (
            f", estimated from {rows:,} of {len(selection):,} rows" if rows < len(selection) else ""
        )
        cut.append(
            f"{name} {100 * unread.share:.1f} % ({unread.lost:,} of {unread.units:,} "
            f"{unread.unit}, in {unread.cut:,} of {unread.rows:,} rows{estimated})"
        )
    findings: list[Finding] = []
    if cut:
        length = modality.inputs().get("length")
        description = f"texts are cut at length {length}, and what lies beyond is never read: "
        description += "; ".join(cut)
        is_much = largest_cut > WARN_SHARE
        advice = f"; {length_advice}" if is_much else ""
        findings.append(Finding(f"{description}{advice}", is_warning=is_much))
    if largest_unknown >= WARN_SHARE:
        findings.append(
            Finding(
                f"the tokenizer does not know some of the {unit} ({', '.join(unknown)}) and reads "
                "all of them as one token; use a tokenizer or a checkpoint that was trained on "
                "texts in this language",
                is_warning=True,
            )
        )
    return findings


def _unread_text(
    modality: CountsUnreadText, selection: Selection, columns: dict[str, str]
) -> tuple[UnreadText | None, int]:
    """Return how much of a sample of the rows is not read, and how many rows the sample has."""
    if not len(selection):
        return None, 0
    bytes_per_row = max(1, selection.manifest.num_bytes // max(1, selection.manifest.num_rows))
    rows = min(SAMPLE_ROWS, max(FEWEST_ROWS, SAMPLE_BYTES // bytes_per_row))
    names = columns_of(("text", "text_pair"), columns)
    table = fit_components.sample(selection, names, rows)
    return modality.unread_text(table, columns), len(table)


def unshared_names(
    modality: ModalitySpec, objective: type[Objective], rows: Selection, columns: dict[str, str]
) -> list[Finding]:
    """List all variables, fields and categories that only the source or only these rows have.

    They are for the report; the terminal has a summary (`ReportsCoverage`), and a warning where the
    source knows little of these rows.
    """
    built = bundle.build_modality(modality)
    if not isinstance(built, ComparesFeatureNames) or not len(rows):
        return []
    table = fit_components.sample(
        rows,
        fit_components.fitted_columns(type(built), objective, columns),
        fit_components.FIT_ROWS,
    )
    sampled = f" (of {len(table):,} of {len(rows):,} rows)" if len(table) < len(rows) else ""
    findings = [
        Finding(difference.text() + sampled, in_terminal=False)
        for difference in built.name_differences(table, columns)
    ]
    share = check_known_share(built, table, columns)
    if share < LEAST_KNOWN:
        text = (
            f"the source knows only {share:.1%} of the values in these rows, and the others are "
            "not read; name columns, variables and categories as in the source's rows"
        )
        findings.insert(0, Finding(text + sampled, is_warning=True))
    return findings


def null_labels(
    objective: type[Objective], splits: dict[str, Selection], columns: dict[str, str]
) -> list[Finding]:
    """Count nulls in the first label column, where the objective takes a null for an answer."""
    if not isinstance(objective, AllowsNullLabels):
        return []
    name = columns[objective.roles[0]]
    counts = {
        split: manifests.read_columns(rows, [name])[name].null_count
        for split, rows in splits.items()
        if len(rows)
    }
    if not any(counts.values()):
        return []
    description = ", ".join(
        f"{count:,} of {len(splits[split]):,} {split} rows"
        for split, count in counts.items()
        if count
    )
    return [
        Finding(
            f"column {name} is null in {description}, which counts as "
            f"{objective.null_label_means}; if it is not known there, leave these rows out"
        )
    ]


def picture_levels(
    modality: ComponentConfig, rows: Selection, columns: dict[str, str]
) -> list[Finding]:
    """Warn where images of 16 bits would be read as nearly black."""
    if modality.name != "image" or not len(rows):
        return []
    # here: torchvision is slow to import, and each worker of a job imports this module
    from pipeline.media import image_io

    column = columns["image"]
    images = fit_components.sample(rows, [column], SAMPLE_IMAGES)[column]
    finding = image_io.describe_unused_levels(image.as_py() for image in images)
    text = f"column {column}: the images of {len(images)} training rows {finding}"
    return [Finding(text, is_warning=True)] if finding else []


def doubtful_steps(metric: str | None, rows: Selection, columns: dict[str, str]) -> list[Finding]:
    """Warn where the metric ``steps`` ranks worse episodes higher.

    It counts longer episodes as better. Where an episode ends with success, the shorter ones are
    better. Demonstrations and random episodes are compared.
    """
    if metric != "steps" or not len(rows):
        return []
    roles = [f"{who}{role}" for who in ("", "random_") for role in ("steps", "success", "return")]
    table = manifests.read_columns(rows, columns_of(roles, columns))

    def numbers(role: str) -> np.ndarray:
        of_both = [columns.get(name) for name in (role, f"random_{role}")]
        missing = np.full(len(table), np.nan)
        return np.concatenate([floats(table[name]) if name else missing for name in of_both])

    steps = numbers("steps")
    for role in ("success", "return"):
        quality = numbers(role)
        is_known = np.isfinite(steps) & np.isfinite(quality)
        lengths, quality = steps[is_known], quality[is_known]
        if not len(quality) or quality.min() == quality.max():
            continue
        is_better = quality > quality.mean()
        better, others = lengths[is_better].mean(), lengths[~is_better].mean()
        if better >= others:
            return []
        text = (
            f"metric steps counts longer episodes as better, and in these rows those of higher "
            f"{role} are shorter (on average {better:.0f} steps, the others {others:.0f}): set "
            f"metric: {role}"
        )
        return [Finding(text, is_warning=True)]
    return []


def doubtful_class_numbers(
    component: ComponentConfig, rows: Selection, columns: dict[str, str]
) -> list[Finding]:
    """Warn where the class names of boxes may be numbered from 1, and of masks of one class alone.

    Args:
        component: The objective as the job states it.
    """
    objective = registry.get("objective", component.name)
    options = objective.options_class(**component.options)
    if "mask" in objective.roles and len(rows):
        from pipeline.media import image_io

        column = columns["mask"]
        masks = fit_components.sample(rows, [column], SAMPLE_MASKS)[column]
        ignore = getattr(options, "ignore", image_io.IGNORED)
        doubt = image_io.doubt_masks((mask.as_py() for mask in masks), ignore)
        text = f"column {column}: the masks of {len(masks)} training rows {doubt}"
        return [Finding(text, is_warning=True)] if doubt else []
    if not isinstance(options, BoxOptions) or not isinstance(options.names, list):
        return []
    from pipeline.media import box_labels

    column = columns["labels"]
    labels = manifests.read_columns(rows, [column])[column]
    values = pc.unique(pc.list_flatten(labels)).drop_null().to_pylist()
    doubt = box_labels.doubt_numbers(options.names, values, column)
    if not doubt:
        return []
    advice = (
        "where that is not by chance, write the number of each name, "
        f"{{{min(values)}: {options.names[0]}, ...}}"
    )
    return [Finding(f"{doubt}: {advice}", is_warning=True)]
