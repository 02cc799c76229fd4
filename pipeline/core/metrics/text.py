"""Metrics of tagged words, answers and transcripts."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import (
    NOT_NEGATIVE,
    SHARE,
    PerLabel,
    Predictions,
    numerator_denominator,
    ratio,
    sum_known,
)


def _f1_of_type(p: Predictions, k: int) -> np.ndarray:
    hits, guessed, actual = (p[name][:, k] for name in ("hits", "guessed", "actual"))
    return numerator_denominator(2 * hits, guessed + actual)


@register("metric", "entity_f1")
@ratio(bounds=SHARE, per_label=PerLabel("entity_f1", units=_f1_of_type))
def entity_f1(p: Predictions) -> np.ndarray:
    """F1 of entities: 2 hits / (found + true), each summed over all types (micro average).
    A hit has the span and the type of a true entity, as in CoNLL-2003 (Tjong Kim Sang and De
    Meulder 2003) and seqeval.
    """
    hits, guessed, actual = (p[name].sum(1) for name in ("hits", "guessed", "actual"))
    return numerator_denominator(2 * hits, guessed + actual)


@register("metric", "word_accuracy")
@ratio(bounds=SHARE)
def word_accuracy(p: Predictions) -> np.ndarray:
    """Share of words whose tag is right."""
    return numerator_denominator(p["right"], p["words"])


@register("metric", "answer_f1")
@ratio(bounds=SHARE)
def answer_f1(p: Predictions) -> np.ndarray:
    """F1 of the words of the answer, by SQuAD's rules (Rajpurkar et al. 2016); the best one over
    the true answers.
    """
    return sum_known(p["f1"], ~np.isnan(p["f1"]))


@register("metric", "exact_match")
@ratio(bounds=SHARE)
def exact_match(p: Predictions) -> np.ndarray:
    """Share of answers that are equal to a true one, by SQuAD's rules (Rajpurkar et al. 2016)."""
    return sum_known(p["exact"], ~np.isnan(p["exact"]))


@register("metric", "wer")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def wer(p: Predictions) -> np.ndarray:
    """Word error rate: wrong, missing and additional words, divided by the true words. Lower is
    better.
    """
    return numerator_denominator(p["word_errors"], p["words"])


@register("metric", "cer")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def cer(p: Predictions) -> np.ndarray:
    """Character error rate, counted as the word error rate is. Lower is better."""
    return numerator_denominator(p["char_errors"], p["chars"])
