"""Numbers that stand for identities (speakers, images, captions): hashes."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from pipeline.core import arrow_lists


def identity_number(name: str | bytes) -> int:
    """Return a number from 0 to 2**63 - 1 that stands for an identity: a hash of its name, or of
    bytes, such as the token ids of a caption.

    It is the same in every split, so that rows of new identities can be compared, and neither
    bundles nor predictions hold the names themselves. Somebody who can list all names can find them
    again.
    """
    content = name.encode() if isinstance(name, str) else name
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def identity_numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Return (n,) int64 identity numbers of a column without nulls.

    Args:
        name: Of the column, for the error.

    Raises:
        ValueError: It holds other values than texts and whole numbers, or a null.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (arrow_lists.is_text(kind) or pa.types.is_integer(kind)):
        raise ValueError(
            f"column {name} holds {kind}: identities are read from texts or whole numbers; cast "
            "the column"
        )
    if column.null_count:
        raise ValueError(f"column {name}: {column.null_count} rows have no identity (null)")
    codes, names = arrow_lists.dictionary_codes(column.cast(pa.large_string()))
    numbers = [identity_number(one) for one in names.to_pylist()]
    return np.array(numbers, dtype=np.int64)[codes]
