"""A model without a network that a user would pick instead.

Each is one file in ``pipeline/transfer/baselines/``.

It reads the rows that the trials of a target read, and is fitted on the same labelled rows for each
seed and label fraction. Estimators and transformers are those of scikit-learn, or have the same
methods. A complete one, which predicts by the length of a text::

    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from pipeline.config.registry import register
    from pipeline.core.contracts import Baseline


    @register("baseline", "text_length")
    class TextLength(Baseline):
        "Logistic regression on the number of characters."

        roles = ("text",)

        def inputs(self, rows):
            texts = rows.read_column("text").to_pylist()
            return np.array([[len(text)] for text in texts])

        def estimator(self, setting, seed, label_kind):
            return LogisticRegression()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.config.registry import Registered
from pipeline.core.contracts.modality import Arrays, Modality

LabelKind = Literal["classes", "label_sets", "numbers", "identities", "position_classes", "actions"]
"""What the labels of rows are.

- ``classes``: (n,) class numbers.
- ``label_sets``: (n, L), 0 or 1.
- ``numbers``: (n,) numbers.
- ``identities``: (n,) identity numbers; test rows may have identities that training rows lack.
- ``position_classes``: (n, M) class numbers of the positions of a row (words, hours); -1 where
  there is none.
- ``actions``: (n, M, A) actions of the steps of a row, standardised numbers or one-hot classes;
  NaN where there is none.
"""
Setting = dict[str, float]
"""One of the settings of a baseline that are tried, by name."""


@dataclass(frozen=True)
class BaselineRows:
    """Some rows of a split, as a baseline reads them."""

    count: int
    """How many inputs are asked for: one for each row, or for each labelled position (or step) of
    the rows, row by row."""
    arrays: Arrays
    """The decoded rows, as ``Modality.decode`` returns them."""
    modality: Modality
    """The one that decoded them."""
    read_column: Callable[[str], Any]
    """Role to the column of these rows as it is stored, a pyarrow array; None where the target has
    no such column."""
    positions: np.ndarray | None = None
    """(n, M) bool, the labelled positions of each row; None where a row has one label."""


class Baseline(Registered, ABC):
    """How rows are summarised, and the estimator that is fitted on the summaries.

    Args:
        options: An instance of the registered options class.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    """It reads modalities whose first role is one of these; empty: all. Written out: read without
    an import."""
    label_kinds: ClassVar[tuple[LabelKind, ...]] = ("classes", "label_sets")
    """Labels that it can predict. Of label sets one estimator is fitted for each label."""

    def __init__(self, options: Any):
        self.options = options

    def settings(self) -> tuple[Setting, ...]:
        """Return the hyper-parameters that are tried; the best on the validation rows is kept."""
        return ({},)

    @abstractmethod
    def inputs(self, rows: BaselineRows) -> Any:
        """Return a list or an array with ``rows.count`` inputs. No label is there to be read."""

    def transformer(self) -> Any:
        """Return what is fitted on the inputs of the labelled training rows, or None.

        It has ``fit`` and ``transform``.
        """
        return None

    @abstractmethod
    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        """Return an estimator that is not fitted.

        It has ``fit``, and by ``label_kind``:

        - ``classes``, ``position_classes``: ``predict_proba`` and ``classes_``.
        - ``label_sets``: the same; each label is a problem of two classes.
        - ``numbers``: ``predict``.
        - ``identities``: ``transform``, which gives vectors to compare by their cosine.
        - ``actions``: ``predict``. They are fitted as (m, A), one row a step; of one-hot classes
          it predicts their shares.
        """
