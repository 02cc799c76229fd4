"""Tokenizers of both kinds, trained once."""

import pytest
from toys import text_modality

from pipeline.modalities.text import Text


@pytest.fixture(scope="session")
def wordpiece() -> Text:
    return text_modality("transformers/bert")


@pytest.fixture(scope="session")
def bpe() -> Text:
    return text_modality("transformers/gpt2")


@pytest.fixture(params=["wordpiece", "bpe"])
def modality(request) -> Text:
    return request.getfixturevalue(request.param)
