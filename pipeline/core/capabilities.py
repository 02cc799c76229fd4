"""Optional protocols: what only some modalities offer.

A class has a capability by defining its members; nothing is declared. Callers test for it with
``isinstance`` (runtime-checkable protocols). Where several callers need the test, it is a function
below the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pipeline.core.batch import Batch
from pipeline.core.contracts.modality import View
from pipeline.core.specs import State

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# ---------------------------------------------------------------- columns


@runtime_checkable
class ReadsFiles(Protocol):
    """A modality whose columns may name files (images, recordings)."""

    file_roles: ClassVar[tuple[str, ...]]
    """Roles of those columns. The content of the named files is part of every key."""


def file_roles(modality: Any) -> tuple[str, ...]:
    """Return the roles of columns that may name files, the input itself first."""
    return modality.file_roles if isinstance(modality, ReadsFiles) else ()


def file_columns(modality: Any, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns that may name files, the input itself first."""
    return tuple(columns_of(file_roles(modality), columns))


def columns_of(roles: Iterable[str], columns: Mapping[str, str]) -> list[str]:
    """Return the columns of those roles that have one, each once."""
    return list(dict.fromkeys(columns[role] for role in roles if role in columns))


@runtime_checkable
class HasReadableColumns(Protocol):
    """A modality with columns that a person can read: texts. Predictions have them too."""

    readable_roles: ClassVar[tuple[str, ...]]
    """Roles of those columns."""


def readable_columns(modality: Any, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns of the input that a person can read."""
    roles = modality.readable_roles if isinstance(modality, HasReadableColumns) else ()
    return tuple(columns_of(roles, columns))


@runtime_checkable
class CutFromRecords(Protocol):
    """A modality of which several rows may be cut from one record (a patient's stay)."""

    record_column: ClassVar[str]
    """Column in which prepared rows keep the record's id. Rows of one record count as the same row
    when a target is compared with its sources."""


class NearSearch(Protocol):
    """How rows that are nearly equal are recognised by the signatures of both."""

    method: str
    """In words, for messages: perceptual hash."""
    settings: tuple[float, ...]
    """Numbers that decide which rows are found."""

    def bands(self, signatures: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """Yield (n,) keys of the rows; only rows that share one of them are compared."""
        ...

    def alike(
        self, signatures: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Return (n,) whether each row is nearly equal to the other one at its index."""
        ...


@runtime_checkable
class FindsNearRows(Protocol):
    """A modality of which rows can be found that are nearly the same (an image stored anew)."""

    near_search: ClassVar[NearSearch]

    @classmethod
    def near_signatures(cls, table: Any, columns: dict[str, str]) -> dict[str, np.ndarray]:
        """Return arrays with an entry for each row, by which rows are compared."""
        ...


def finds_near_rows(modality: Any) -> TypeIs[FindsNearRows]:
    """Return whether rows of the modality that are nearly the same can be found."""
    return isinstance(modality, FindsNearRows)


# ---------------------------------------------------------------- options


@runtime_checkable
class ChecksRoles(Protocol):
    """A modality with options that suit only some objectives."""

    def check(self, roles: tuple[str, ...]) -> None:
        """Raise ValueError where the options do not suit an objective that reads these roles."""
        ...


def check_roles(modality: Any, roles: tuple[str, ...]) -> None:
    """Raise ValueError where a modality's options do not suit these roles of an objective."""
    if isinstance(modality, ChecksRoles):
        modality.check(roles)


@runtime_checkable
class ChecksOptions(Protocol):
    """A modality with options that have no effect beside some others."""

    @classmethod
    def ineffective_options(
        cls, stated: Mapping[str, Any], inherited: Mapping[str, Any] | None = None
    ) -> str:
        """Describe an option that a job states and that would change nothing; "" for none.

        Args:
            stated: Options as one place of the job gives them.
            inherited: Those of the source or checkpoint, where the job does not state them again.
        """
        ...


def ineffective_options(
    modality: Any, stated: Mapping[str, Any], inherited: Mapping[str, Any] | None = None
) -> str:
    """Describe an option that is stated and changes nothing (`ChecksOptions`); "" for none."""
    if not isinstance(modality, ChecksOptions):
        return ""
    return modality.ineffective_options(stated, inherited)


# ---------------------------------------------------------------- fitting


@runtime_checkable
class ExtendsState(Protocol):
    """A modality whose state lists kinds of rows (robots, tasks) and grows with new ones."""

    fit_roles: ClassVar[tuple[str, ...]]
    """Roles that are read to fit or extend the state, whatever the objective predicts. Those left
    out are large (frames).
    """
    strata: ClassVar[tuple[str, ...]]
    """Roles of which every value must be in the sample of rows that the state is fitted on."""

    def extend_state(self, table: Any, columns: dict[str, str]) -> State:
        """Return the state with what is new in these rows appended; the rest does not change."""
        ...


def extends_state(modality: Any) -> TypeIs[ExtendsState]:
    """Return whether the modality's state grows with new kinds of rows."""
    return isinstance(modality, ExtendsState)


@runtime_checkable
class ReportsCoverage(Protocol):
    """A modality that knows its inputs by name: variables, fields, robots."""

    def coverage(self, table: Any, columns: dict[str, str]) -> str:
        """Describe what of these rows the state covers and what is ignored; "" for nothing."""
        ...


def reports_coverage(modality: Any) -> TypeIs[ReportsCoverage]:
    """Return whether the modality knows its inputs by name."""
    return isinstance(modality, ReportsCoverage)


@runtime_checkable
class MeasuresKnownShare(Protocol):
    """A modality that finds its inputs by name (variables, fields, categories)."""

    def check_known_share(self, table: Any, columns: dict[str, str]) -> float:
        """Return the share of the values in these rows that the state knows, 1 without values.

        Raises:
            ValueError: It knows none of them. The message has the nearest names.
        """
        ...


def check_known_share(modality: Any, table: Any, columns: dict[str, str]) -> float:
    """Return the share of the values in rows that the modality knows, 1 if it cannot measure it.

    Raises:
        ValueError: It knows none of them. The message has the nearest names.
    """
    measures = isinstance(modality, MeasuresKnownShare)
    return modality.check_known_share(table, columns) if measures else 1.0


class NameDifference(NamedTuple):
    """Names that only one side of a transfer has."""

    what: str
    names: tuple[str, ...]
    rare: int = 0
    """How many more there are that too few rows have: a rare name may identify a person."""

    def text(self) -> str:
        rare = [f"{self.rare} that few rows have"] if self.rare else []
        return f"{self.what} ({len(self.names) + self.rare}): {', '.join([*self.names, *rare])}"


@runtime_checkable
class ComparesFeatureNames(Protocol):
    """A modality whose inputs are known by name and can be listed."""

    def name_differences(self, table: Any, columns: dict[str, str]) -> list[NameDifference]:
        """List the names that only the fitted state has, and those that only these rows have."""
        ...


@runtime_checkable
class HasSingleFeatures(Protocol):
    """A modality whose rows are made of single features (columns of a table)."""

    def single_features(
        self, table: Any, columns: dict[str, str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each feature that the state knows, by name, with its value in every row.

        Values are (n,) float64 with NaN where there is none, or (n,) int64 category numbers.
        """
        ...


def has_single_features(modality: Any) -> TypeIs[HasSingleFeatures]:
    """Return whether rows of the modality are made of single features."""
    return isinstance(modality, HasSingleFeatures)


# ---------------------------------------------------------------- rows


@runtime_checkable
class Costed(Protocol):
    """A modality whose rows cost different amounts to train on: batches may be cut by cost."""

    cost_role: ClassVar[str]
    """Optional role of a column that holds the cost, so that no file has to be opened."""
    cost_unit: ClassVar[str]
    """Unit of the cost, for messages: seconds, steps."""

    def costs(self, table: Any, columns: dict[str, str]) -> np.ndarray:
        """Return (B,) float64 costs, from the column of ``cost_role`` where there is one.

        0 where the cost cannot be found. ``columns`` may hold that role alone.
        """
        ...


def is_costed(modality: Any) -> TypeIs[Costed]:
    """Return whether rows of the modality cost different amounts to train on."""
    return isinstance(modality, Costed)


def cost_column(modality: Any, columns: Mapping[str, str]) -> str | None:
    """Return the column that holds what rows cost, or None where there is none."""
    return columns.get(modality.cost_role) if is_costed(modality) else None


@runtime_checkable
class MakesRandomRows(Protocol):
    """A modality whose rows can be made up: an export is compared with its bundle on such rows."""

    def random_rows(
        self, rows: int, rng: np.random.Generator, length: float = 1.0
    ) -> dict[str, Tensor]:
        """Return rows of random content, as ``collate`` returns them; padded ones where the
        modality pads.

        Args:
            rows: How many.
            rng: Where their content is drawn from.
            length: How long they are, as a share of the longest rows that this gives; rows of one
                size stay as they are.
        """
        ...


@runtime_checkable
class MeasuresThroughput(Protocol):
    """A modality whose throughput is logged in another unit than rows."""

    throughput_unit: ClassVar[str]
    """For messages: tokens, s of sound."""

    def throughput(self, batch: Batch) -> float:
        """Return how many units a batch holds, padding left out."""
        ...


def measures_throughput(modality: Any) -> TypeIs[MeasuresThroughput]:
    """Return whether the modality's throughput is logged in another unit than rows."""
    return isinstance(modality, MeasuresThroughput)


class UnreadText(NamedTuple):
    """How much is not read: ``lost`` of ``units`` are cut off, in ``cut`` of ``rows`` rows."""

    rows: int
    cut: int
    units: int
    lost: int
    unit: str
    """What is counted: words, tokens."""
    unknown: float = 0.0
    """Share of the units that the tokenizer does not know, at least in part."""

    @property
    def share(self) -> float:
        return self.lost / self.units if self.units else 0.0


@runtime_checkable
class CountsUnreadText(Protocol):
    """A modality that cuts long texts, or whose tokenizer does not know every token."""

    def unread_text(self, table: Any, columns: dict[str, str]) -> UnreadText | None:
        """Count what is cut off, and what the tokenizer does not know.

        None for rows of token ids.
        """
        ...


@runtime_checkable
class Packs(Protocol):
    """A modality of text: rows can be turned into token ids once, before training."""

    packed_roles: ClassVar[tuple[str, ...]]
    """Column roles of packed rows; ``tokenize`` makes the first one."""

    def pack(self, table: Any, columns: dict[str, str]) -> tuple[Any, list[str]]:
        """Concatenate documents into rows of one length.

        Returns:
            A pyarrow table, and for each document "" or the reason why it was left out.
        """
        ...

    def tokenize(
        self,
        table: Any,
        columns: dict[str, str],
    ) -> tuple[Any, list[str]] | None:
        """Replace the text column by token ids; None where rows of this kind are left as they are.

        Returns:
            The usable rows (a pyarrow table), and for each row "" or the reason why it was left
            out. ``decode`` gives the same for these rows, with ``columns`` naming that role alone.
        """
        ...


def can_pack(modality: Any) -> TypeIs[Packs]:
    """Return whether rows of the modality can be turned into token ids once, before training."""
    return isinstance(modality, Packs)


@runtime_checkable
class ShowsPictures(Protocol):
    """A modality whose rows can be looked at: predictions are drawn on them."""

    def pictures(self, table: Any, columns: dict[str, str]) -> Iterator[np.ndarray | None]:
        """Yield (H, W, 3) uint8 of each row as it is stored; None where it cannot be read."""
        ...


def shows_pictures(modality: Any) -> TypeIs[ShowsPictures]:
    """Return whether rows of the modality can be looked at."""
    return isinstance(modality, ShowsPictures)


@runtime_checkable
class DecodesOnDevice(Protocol):
    """A modality whose files can be decoded on the device (JPEG on a GPU)."""

    def encoded(
        self,
        table: Any,
        columns: dict[str, str],
    ) -> tuple[np.ndarray, list[str]]:
        """Read files without decoding them.

        Returns:
            (B,) objects for ``unpack``, and for each row "" or the reason why there is none.
        """
        ...

    def unpack(
        self, encoded: np.ndarray, device: torch.device
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Decode on the device what ``encoded`` read, to the tensors that ``decode`` would give."""
        ...


def decodes_on_device(modality: Any) -> TypeIs[DecodesOnDevice]:
    """Return whether files of the modality can be decoded on the device."""
    return isinstance(modality, DecodesOnDevice)


@runtime_checkable
class MakesViews(Protocol):
    """A modality that can make random views of a row for self-supervised objectives."""

    def views(self, batch: Batch, views: tuple[View, ...]) -> Batch:
        """Add ``view0``, ``view1``, ...: finished tensors, random by ``batch.keys`` alone."""
        ...


def makes_views(modality: Any) -> TypeIs[MakesViews]:
    """Return whether the modality can make random views of a row."""
    return isinstance(modality, MakesViews)


@runtime_checkable
class HasAugmentOptions(Protocol):
    """A modality with options that only ``augment`` reads; random views are made without them."""

    augment_options: ClassVar[tuple[str, ...]]
    """Names of those options."""


def augment_options(modality: Any) -> tuple[str, ...]:
    """Return the names of the options that only ``augment`` reads."""
    return modality.augment_options if isinstance(modality, HasAugmentOptions) else ()


@runtime_checkable
class PreparesInputs(Protocol):
    """A modality whose preparation of a row can be written down as a few lines of Python."""

    def preparation_code(self) -> str:
        """Return code that makes ``inputs``, the arrays of an exported network by name.

        It needs numpy (as ``np``) and small libraries that it imports, nothing of this package. It
        stands in the README of an export, whose folder has ``tokenizer.json`` for texts.
        """
        ...


@runtime_checkable
class PreparesWords(Protocol):
    """A modality whose rows may be lists of words."""

    def preparation_code_of_words(self) -> str:
        """Return code as `PreparesInputs` does, for rows that are lists of words."""
        ...


def preparation_code(modality: Any, rows_are_words: bool = False) -> str | None:
    """Return the code that prepares a row, None for a modality that has none.

    Args:
        modality: The modality.
        rows_are_words: Whether rows are lists of words.
    """
    if rows_are_words and isinstance(modality, PreparesWords):
        return modality.preparation_code_of_words()
    return modality.preparation_code() if isinstance(modality, PreparesInputs) else None
