"""Images in one folder a class, in a folder, zip or tar."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    Index,
    check_no_empty_classes,
    depth,
    file_row,
    first_few,
    index_table,
    split_of_folder,
)
from pipeline.prepare.readers import archives


class ImageFolderOptions(Options):
    layout: Literal["auto", "split/class", "class"] = Field(
        "auto",
        description="auto: split/class when every top folder is called train, val, test or the "
        "like (Train, val2017), else class",
    )


@register("importer", "imagefolder", options=ImageFolderOptions)
class ImageFolder(ImageImporter):
    """Images in a folder for each class.

    SPLIT/CLASS/FILE or CLASS/FILE in a folder, zip or tar; a tar or zip in the folder counts as
    a folder, and a top folder that holds everything is ignored.

    Columns: `label` (the class folder's name).
    """

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        tops = _top_folders(listing)
        is_deep = min((depth(entry.name) for entry in listing.images), default=0) > 2
        if len(tops) == 1 and is_deep and not all(map(split_of_folder, tops)):
            parts = listing.images[0].name.split("/")
            listing = listing.without_common_folder(keep=list(filter(split_of_folder, parts)))
            tops = _top_folders(listing)
        split = self.options.layout == "split/class" or (
            self.options.layout == "auto" and all(map(split_of_folder, tops))
        )
        wanted = 3 if split else 2
        wrong = [entry.name for entry in listing.images if depth(entry.name) != wanted]
        if wrong:
            raise ValueError(
                f"{source}: images that do not lie as "
                f"{'SPLIT/CLASS/FILE' if split else 'CLASS/FILE'}: {first_few(wrong)}; "
                "move them, or pass --set layout=split/class or class"
            )
        check_no_empty_classes([*listing.empty, *_without_images(listing, wanted)], source)
        rows = []
        for entry in listing.images:
            *before, label, _ = entry.name.split("/")
            row_split = (split_of_folder(before[0]) or before[0]) if before else "train"
            rows.append(file_row(entry, row_split, label=label))
        splits = Counter(row["split"] for row in rows)
        return Index(
            index_table(rows, {"label": pa.string()}, source),
            listing.fingerprint,
            info={"labels": sorted({row["label"] for row in rows})},
            notes={
                "layout": "split/class" if split else "class, all rows in train",
                "rows": dict(splits),
                "files left out": listing.others(),
            },
        )


def _top_folders(listing: archives.Listing) -> set[str]:
    names = [*(entry.name for entry in listing.images), *listing.empty]
    return {name.split("/")[0] for name in names}


def _without_images(listing: archives.Listing, wanted: int) -> list[str]:
    """Return class folders that hold other files only."""
    full = {entry.name.rpartition("/")[0] for entry in listing.images}
    return sorted(
        {entry.name.rpartition("/")[0] for entry in listing.entries if depth(entry.name) == wanted}
        - full
    )
