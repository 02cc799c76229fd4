"""WebDataset shards: tars in which files that share a key are a sample (Aizman et al. 2019)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.data.to_parquet import IMAGE_SUFFIXES
from pipeline.io import storage
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import Index, file_row, first_few, index_table, split_of_file
from pipeline.prepare.readers import archives

TEXTS = ("cls", "txt", "json")


@dataclass
class Sample:
    """The parts of a sample by their suffix: short texts, and other files."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, archives.Entry] = field(default_factory=dict)


class WebDatasetOptions(Options):
    label: str = Field(
        "cls", description="where a sample's label is: cls, txt or json.FIELD; empty: no label"
    )
    label_name: str = Field("", description="where its name is, likewise; empty: none")
    split: str = Field(
        "",
        description="the split of all shards; empty: from the shard's name or folder "
        "(train-000.tar, set-validation-00.tar), else train",
    )


@register("importer", "webdataset", options=WebDatasetOptions)
class WebDataset(ImageImporter):
    """WebDataset: images and labels in tar shards.

    Tar shards (a folder, a glob, NAME-{000..123}.tar) of KEY.jpg (or png, webp, gif, bmp) with
    KEY.cls, KEY.txt, KEY.json; other parts are left out.

    Columns: `label` (a number if all are), `label_name` if asked for, `text` (from txt) and `json`
    if samples have them, `key`.
    """

    def index(self, source: str) -> Index:
        shards = _shards(source)
        rows, fingerprints, bare, left = [], [], [], {}
        for shard, (samples, fingerprint) in zip(
            shards, threaded_map(_samples, shards), strict=True
        ):
            path = PurePosixPath(storage.file_name(shard))
            shard_name = path.name
            fingerprints.append(f"{shard_name} {fingerprint}")
            split = self.options.split or split_of_file(f"{path.parent.name}/{path.name}")
            for key, sample in samples.items():
                files = sample.files
                kind = next((suffix for suffix in files if f".{suffix}" in IMAGE_SUFFIXES), None)
                for suffix in files.keys() - {kind}:
                    left[suffix] = left.get(suffix, 0) + 1
                if kind is None:
                    bare.append(f"{shard}:{key}")
                    continue
                columns = {
                    "label": self._value(sample, self.options.label, f"{shard}:{key}"),
                    "label_name": self._value(sample, self.options.label_name, f"{shard}:{key}"),
                    "text": sample.texts.get("txt"),
                    "json": sample.texts.get("json"),
                    "key": key,
                }
                image = files[kind]._replace(name=f"{shard_name}/{files[kind].name}")
                rows.append(file_row(image, split, **columns))
        kinds: dict[str, pa.DataType] = {"key": pa.string()}
        if self.options.label:
            whole = all(re.fullmatch(r"-?\d{1,18}", row["label"]) for row in rows)
            for row in rows if whole else ():
                row["label"] = int(row["label"])
            kinds["label"] = pa.int64() if whole else pa.string()
        kinds |= {"label_name": pa.string()} if self.options.label_name else {}
        kinds |= {
            name: pa.string()
            for name in ("text", "json")
            if any(row[name] is not None for row in rows)
        }
        return Index(
            index_table(rows, kinds, source),
            " ".join(fingerprints),
            notes={
                "shards": len(shards),
                "samples without an image, left out": len(bare),
                "parts left out": left,
            },
        )

    def _value(self, sample: Sample, where: str, place: str) -> str | None:
        """Return the text that an option points to. Raises ValueError when the sample has none."""
        if not where:
            return None
        part, _, name = where.partition(".")
        if part not in TEXTS or (part == "json") != bool(name):
            raise ValueError(f"label {where!r}: write cls, txt or json.FIELD")
        if part not in sample.texts:
            have = ", ".join([*sample.files, *sample.texts])
            raise ValueError(
                f"{place}: no part {part} for the label (it has {have}); pass --set "
                "label=json.FIELD, or --set label= for none"
            )
        if not name:
            return sample.texts[part].strip()
        try:
            value = json.loads(sample.texts[part])[name]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{place}: its json has no {name!r} ({type(error).__name__}: {error})"
            ) from None
        return value if isinstance(value, str) else json.dumps(value)


def _shards(source: str) -> list[str]:
    """Return the tars of a folder, glob or brace range, sorted.

    Raises ValueError if there is none, or one of a range is missing.
    """
    spread = _braces(source)
    found = [
        uri
        for text in spread
        for uri in (storage.list_files(text) if storage.is_dir(text) else storage.glob(text))
    ]
    missing = [text for text in spread if len(spread) > 1 and not storage.exists(text)]
    if missing:
        raise ValueError(f"{source}: shards that are not there: {first_few(missing)}")
    tars = sorted(
        uri
        for uri in found
        if archives.has_suffix(uri, ".tar", *archives.GZIPPED, *archives.COMPRESSED)
    )
    if not tars:
        raise ValueError(f"{source}: no .tar shards there")
    return tars


def _braces(text: str) -> list[str]:
    """Expand NAME-{000..123}.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    first, last = found[1], found[2]
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [
        whole
        for number in numbers
        for whole in _braces(text[: found.start()] + number + text[found.end() :])
    ]


def _samples(shard: str) -> tuple[dict[str, Sample], str]:
    """Return (the samples by their key, the shard's fingerprint)."""
    listing = archives.listing(shard)
    samples: dict[str, Sample] = {}
    with archives.Reader() as reader:
        for entry in sorted(listing.entries, key=lambda e: e.offset):
            folder, _, name = entry.name.rpartition("/")
            key, _, suffix = name.partition(".")
            key, suffix = f"{folder}/{key}".lstrip("/"), suffix.lower()
            sample = samples.setdefault(key, Sample())
            if suffix in sample.files or suffix in sample.texts:
                raise ValueError(f"{shard}: sample {key} has two parts {suffix}")
            if suffix in TEXTS:
                try:
                    sample.texts[suffix] = reader.entry(entry).decode()
                except UnicodeDecodeError as error:
                    problem = f"{error.reason} at byte {error.start}"
                    raise ValueError(f"{shard}: {entry.name}: not UTF-8 text ({problem})") from None
            else:
                sample.files[suffix] = entry
    return samples, listing.fingerprint
