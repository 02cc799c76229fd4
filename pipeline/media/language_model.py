"""The n-gram language model of a beam search: its file, and a copy of it for bundles.

The file is ARPA or KenLM's binary form (Heafield 2011); each label of the recogniser is a word.
"""

from __future__ import annotations

import base64
import posixpath
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from pipeline.io import storage

HELD_BYTES = 16 * 2**20
"""A file up to this size is copied into bundles. Of a larger one they hold the SHA-256."""
SPACE = "|"
"""How the file writes the space, which is not one of its words."""


class FileCopy(NamedTuple):
    """A file as a bundle holds it."""

    sha256: str
    content: str | None
    """Base64 of what zlib makes of it; None for a file that is larger than `HELD_BYTES`."""

    def unpacked(self) -> bytes | None:
        """Return the file's bytes, where they are held."""
        return None if self.content is None else zlib.decompress(base64.b64decode(self.content))


def copy_file(path: str) -> FileCopy:
    """Return the checksum of a file, and its content if it is not too large."""
    sha256, num_bytes = storage.sha256(path)
    if num_bytes > HELD_BYTES:
        return FileCopy(sha256, None)
    return FileCopy(sha256, base64.b64encode(zlib.compress(storage.read_bytes(path))).decode())


@contextmanager
def _local_file(path: str, copy: FileCopy | None) -> Iterator[str]:
    """Give a local path of the file: of its copy, where there is one.

    Raises:
        ValueError: the file is not there, or not the one that the network was trained with.
    """
    held = copy.unpacked() if copy is not None else None
    if held is not None:
        with storage.scratch_folder() as scratch:
            unpacked = scratch / posixpath.basename(path)
            unpacked.write_bytes(held)
            yield str(unpacked)
        return
    file = storage.absolute(path)
    if storage.is_remote(path) or not storage.exists(path):
        raise ValueError(
            f"objective.lm: there is no file {file} on this machine, and the bundle holds no copy "
            f"(it is larger than {HELD_BYTES >> 20} MiB, or the bundle is of an earlier version): "
            "put the file that the network was trained with there, or in a job name another one"
        )
    if copy is not None:
        sha256, _ = storage.sha256(path)
        if sha256 != copy.sha256:
            raise ValueError(
                f"objective.lm: {file} is not the file that the network was trained with: its "
                f"SHA-256 is {sha256}, that file's is {copy.sha256}; put that file there"
            )
    yield file


def read(path: str, copy: FileCopy | None, labels: tuple[str, ...]) -> Any:
    """Read a language model of the labels.

    Args:
        path: The file, relative to the current folder where it is not absolute.
        copy: What a bundle holds of it; None for a bundle of an earlier version.

    Raises:
        ValueError: the file is not there, not readable, or a model of something else.
    """
    kenlm = import_module("flashlight.lib.text.decoder.kenlm")
    dictionary = import_module("flashlight.lib.text.dictionary")
    names = [SPACE if label == " " else label for label in labels]
    with _local_file(path, copy) as file:
        try:
            entries = dictionary.Dictionary([*names, "\N{REPLACEMENT CHARACTER} no label"])
            model = kenlm.KenLM(file, entries)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"objective.lm: {path} is not readable as a language model: "
                f"{str(error).splitlines()[0]}"
            ) from None
    start = model.start(False)
    score_of_unknown = model.score(start, len(names))[1]
    scores = {number: model.score(start, number)[1] for number in range(1, len(names))}
    unknown = [names[number] for number, score in scores.items() if score == score_of_unknown]
    if len(unknown) > len(labels) // 2:
        raise ValueError(
            f"objective.lm: {path} does not know {len(unknown)} of {len(labels) - 1} labels "
            f"({', '.join(unknown[:8])}): it must be a model of the labels, not of words; train "
            f"it on the transcripts with a space between any two labels, and {SPACE} for their "
            "own spaces"
        )
    return model
