"""Write a source as Parquet shards: in parallel, each shard whole and with checksums; shards that
exist are kept.

A shard's rows follow from the source, the options and the code alone, so a run that was killed and
goes on writes the same bytes. What a shard is and how it is made is the importer's plan
(`shard_tasks.ShardTask`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pipeline.config import provenance, registry
from pipeline.config.schema import spec_hash
from pipeline.io import atomic_folder, checksums, file_identity, s3, storage
from pipeline.io.threads import threaded_map
from pipeline.io.wording import plural
from pipeline.prepare.engine import croissant, summary
from pipeline.prepare.engine.importing import InvalidRow, first_few
from pipeline.prepare.engine.shard_tasks import (
    SCANS,
    Amounts,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    run_tasks,
    sum_by_split,
)

MANIFEST, BEGUN = "_manifest.json", "_prepare.json"
"""Names that begin with an underscore are ignored where the folder is read as data."""
FORMAT_VERSION = 1
MAX_NAMED = 3
"""An error message names so many invalid rows."""


class ShardRecord(TypedDict):
    """What `_parts` of an output says of a complete shard."""

    sha256: str
    size: int
    sha256_pieces: NotRequired[str]
    rows: int
    broken: list[InvalidRow]
    amounts: NotRequired[Amounts]


class Preparation:
    """The shards of one source, and which of them are still to be written.

    Raises ValueError for a source that is not in the importer's format, and for an output folder
    that holds something else.
    """

    def __init__(
        self,
        name: str,
        source: str,
        output: str,
        options: Any = None,
        settings: Settings | None = None,
    ):
        storage.refuse_read_only(output)
        importer: Importer = registry.get("importer", name)(options)
        self.name, self.output = name, storage.absolute(output)
        self.settings = settings or Settings()
        self.source = storage.absolute(source) if importer.reads_files else source
        if importer.reads_files and f"{self.output}/".startswith(f"{self.source}/"):
            raise ValueError(
                f"{self.output} lies in {self.source}: the parts would become part of what "
                "they are made of; give a folder outside"
            )
        self.options, self._components = importer.options, importer.components
        with file_identity.recorded_identities() as self._files:
            self.task = importer.plan(self.source, self.settings)
        self.shards = self.task.shards
        self.key = spec_hash(FORMAT_VERSION, name, importer.options, *self.task.key)
        self._check_output()

    def _check_output(self) -> None:
        begun = storage.join(self.output, BEGUN)
        if storage.exists(begun):
            if self._begun_key() != self.key and self._holds_parts():
                raise ValueError(
                    f"{self.output} holds parts of another source, of other options or of an "
                    f"earlier version's rules (see {BEGUN} there); give an empty folder"
                )
        elif others := [
            uri
            for uri in storage.list_files(self.output)
            if not uri.rpartition("/")[2].startswith(".")
        ]:
            raise ValueError(
                f"{self.output} holds other files "
                f"({first_few(name.rpartition('/')[2] for name in others)}); give an empty folder"
            )

    def _begun_key(self) -> str:
        """Return the key that the folder was begun with.

        Raises DamagedError, with what to do, if it cannot be read.
        """
        begun = storage.join(self.output, BEGUN)
        try:
            return checksums.read_document(begun)["key"]
        except (storage.DamagedError, KeyError) as error:
            raise storage.DamagedError(
                f"{begun} is damaged ({error}), so nobody can tell what the parts there are "
                "made of; give an empty folder"
            ) from None

    @cached_property
    def _code(self) -> str:
        """Hash of the code that makes the rows."""
        return provenance.made_by((), self._components).hash

    def _check_code(self) -> None:
        """Remove scans of another source or of other code.

        Raises ValueError for parts of other code: rows of two versions would stand in one folder.
        """
        stated = checksums.read_document(storage.join(self.output, BEGUN))
        if stated["key"] == self.key and stated.get("code") == self._code:
            return
        if self._holds_parts():
            raise ValueError(
                f"{self.output} is incomplete, and another version of the code made the parts "
                "there. Its rules may differ, so the folder cannot be completed: empty it, or give "
                "another one"
            )
        storage.remove_tree(storage.join(self.output, SCANS))

    def _holds_parts(self) -> bool:
        """Whether a run that began here has written anything but scans."""
        below = [uri[len(self.output) :].lstrip("/") for uri in storage.list_files(self.output)]
        return any(name != BEGUN and not name.startswith((f"{SCANS}/", ".")) for name in below)

    @cached_property
    def records(self) -> dict[str, ShardRecord]:
        """Records of complete shards: those whose file has the size that its record states."""
        files = set(storage.list_files(self.output))

        def record(shard: OutputShard) -> ShardRecord | None:
            uri = storage.join(self.output, shard.name)
            if not {uri, self._record_uri(shard)} <= files:
                return None
            found = checksums.document_or_none(
                self._record_uri(shard), f"{shard.name} is made again"
            )
            is_whole = found is not None and storage.size(uri) == found["size"]
            return cast(ShardRecord, found) if is_whole else None

        found = {
            shard.name: one
            for shard, one in zip(self.shards, threaded_map(record, self.shards), strict=True)
            if one
        }
        is_finished = storage.join(self.output, MANIFEST) in files
        return found if is_finished or storage.is_remote(self.output) else self._undamaged(found)

    def _undamaged(self, records: dict[str, ShardRecord]) -> dict[str, ShardRecord]:
        """Keep the records of shards whose SHA-256 is as recorded.

        Shards of a finished folder are not compared here, but where they are read.
        """
        files = file_identity.identify([storage.join(self.output, name) for name in records])
        out = {}
        for file, (name, record) in zip(files, records.items(), strict=True):
            if checksums.is_same(file.content, record):
                out[name] = record
            else:
                checksums.notify(
                    f"{file.uri} is damaged: it does not have the SHA-256 that was recorded "
                    "when it was written: it is made again"
                )
        return out

    @property
    def todo(self) -> list[OutputShard]:
        return [shard for shard in self.shards if shard.name not in self.records]

    def _record_uri(self, shard: OutputShard) -> str:
        return storage.join(self.output, "_parts", shard.name.removesuffix(".parquet") + ".json")

    @property
    def is_done(self) -> bool:
        return not self.todo and storage.exists(storage.join(self.output, MANIFEST))

    def run(
        self,
        report_progress: ProgressCallback = lambda line, final: None,
        cpus: float = 1.0,
    ) -> dict[str, Any]:
        """Write the missing shards, as Ray tasks if Ray is running, and the manifest last.

        Args:
            report_progress: takes a line, and whether it is the last of its kind.
            cpus: of each task.

        Returns:
            The manifest.

        Raises:
            ValueError: more invalid rows than `max_bad` allows.
            ChangedFileError: a file of the source was changed since it was planned.
        """
        complete = [shard.name for shard in self.shards if shard.name in self.records]
        invalid = [*self.task.invalid]
        invalid += [row for name in complete for row in self.records[name]["broken"]]
        if self.is_done:
            manifest = atomic_folder.open_folder(self.output, MANIFEST)
            self._check_listed(
                invalid, manifest.get("read", sum(manifest["rows"].values()) + len(invalid))
            )
            return manifest
        begun = storage.join(self.output, BEGUN)
        if storage.exists(begun):
            self._check_code()
        checksums.write_document(
            begun,
            {
                "key": self.key,
                "code": self._code,
                "importer": self.name,
                "source": self.source,
                "options": self.options.model_dump(mode="json"),
            },
        )
        self.task.before_shards(self.output, self._check_budget, report_progress, cpus)
        self._check_listed(invalid, self.task.total)
        self._write_shards(invalid, report_progress, cpus)
        self._check_source()
        return self._finish(invalid)

    def _write_shards(
        self,
        invalid: list[InvalidRow],
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        """Write the missing shards and their records; adds their invalid rows to `invalid`."""
        todo = self.todo
        done = len(self.task.invalid) + sum(
            self.task.source_rows(shard) for shard in self.shards if shard.name in self.records
        )
        jobs = ((storage.join(self.output, shard.name), self.task.payload(shard)) for shard in todo)
        for shard, record in zip(
            todo, run_tasks(partial(write_shard, self.task.make_shard), jobs, cpus), strict=True
        ):
            self.records[shard.name] = record
            checksums.write_document(self._record_uri(shard), record)
            invalid += record["broken"]
            self._check_listed(invalid, self.task.total)
            done += self.task.source_rows(shard)
            report_progress(
                f"prepare {self.name}: {done}/{self.task.total} rows  {len(invalid)} broken",
                done == self.task.total,
            )

    def _check_source(self) -> None:
        """Raise ChangedFileError if a file of the source was changed while its shards were made."""
        try:
            file_identity.check_unchanged(self._files)
        except file_identity.ChangedFileError as error:
            raise file_identity.ChangedFileError(
                f"{error}, into an empty folder: {self.output} holds parts of the old and of the "
                "new file"
            ) from None

    def describe(self) -> str:
        """Describe the finished output in a line."""
        done = atomic_folder.open_folder(self.output, MANIFEST)
        splits = ", ".join(f"{split} {n}" for split, n in done["rows"].items())
        rows = f"{splits} {'row' if sum(done['rows'].values()) == 1 else 'rows'}"
        # Of recordings that were cut there are more than were read
        dropped = max(0, done.get("read", 0) - sum(done["rows"].values()) - done["broken"])
        left = f"left out: {done['broken']} broken{f', {dropped} dropped' if dropped else ''}"
        warnings = "".join(f"\nwarning: {line}" for line in done.get("warnings", ()))
        parts = plural(len(done["files"]), "part")
        return f"{self.output}: {rows} in {parts}, {left}; see _summary.md there{warnings}"

    def _check_listed(self, invalid: list[InvalidRow], total: int) -> None:
        """Check the invalid rows against the budget.

        Rows that are pieces of a recording are compared with an estimate of how many there will be,
        from the shards that are complete.
        """
        pieces = [row for row in invalid if "pieces" in row]
        groups = [([row for row in invalid if "pieces" not in row], total)]
        if pieces:
            stand = [shard for shard in self.shards if shard.name in self.records]
            records = [self.records[shard.name] for shard in stand]
            rows = sum(record["rows"] + len(record["broken"]) for record in records)
            read, of_all = (sum(map(self.task.source_rows, some)) for some in (stand, self.shards))
            groups.append((pieces, rows * of_all // read))
        for found, of in groups:
            self._check_budget(
                [f"{row['path']}: {row['reason']}" for row in found[:MAX_NAMED]], len(found), of
            )

    def _check_budget(self, first: list[str], invalid: int, total: int) -> None:
        share = self.settings.max_bad
        if invalid > (max(1, share * total) if share else 0):
            raise ValueError(
                f"{invalid} of {total} rows are broken, more than --max-bad {share:g} allows. "
                f"First ones: {'; '.join(first[:MAX_NAMED])}"
            )

    def _summarise(self, invalid: list[InvalidRow]) -> dict[str, Any]:
        """Write the summary of all shards, and return it."""
        amounts = sum_by_split(
            (name, split, count)
            for record in self.records.values()
            for name, counts in record.get("amounts", {}).items()
            for split, count in counts.items()
        )
        notes = {**self.task.notes, **self.task.summary_amounts(amounts)}
        found = summary.summarise(
            self.output,
            [shard.name for shard in self.shards],
            self.task.label,
            self.task.measures,
            invalid,
            notes,
        )
        if found["duplicates"] and not self.task.shows_paths:
            found["duplicates"]["examples"] = []
        storage.write_json(storage.join(self.output, "_summary.json"), found)
        storage.write_bytes(
            storage.join(self.output, "_summary.md"),
            summary.markdown(f"{self.name}: {self.source}", found, self.task.noun).encode(),
        )
        return found

    def _finish(self, invalid: list[InvalidRow]) -> dict[str, Any]:
        """Write the summary, the descriptions for others and, last, the manifest."""
        found = self._summarise(invalid)
        self._describe_for_others(found)
        self.task.after_shards(self.output)
        manifest = atomic_folder.with_checksum(
            {
                "format_version": FORMAT_VERSION,
                "importer": self.name,
                "options": self.options.model_dump(mode="json"),
                "source": self.source,
                "key": self.key,
                "resize": self.settings.resize,
                "quality": self.settings.quality,
                "rows": found["rows"],
                "broken": len(invalid),
                "read": self.task.total,
                **({"warnings": warned} if (warned := summary.warnings(found)) else {}),
                "about": self.task.info,
                "columns": {field.name: str(field.type) for field in self.task.schema},
                "files": {
                    shard.name: _entry(self.records[shard.name]) | {"split": shard.split}
                    for shard in self.shards
                },
            }
        )
        storage.write_json(storage.join(self.output, MANIFEST), manifest)
        storage.remove_tree(storage.join(self.output, SCANS))
        return manifest

    def _describe_for_others(self, found: dict[str, Any]) -> None:
        """Write the Croissant metadata and the data card. The manifest does not name them."""
        name = str(self.output).rstrip("/").rpartition("/")[2]
        entries = {shard.name: _entry(self.records[shard.name]) for shard in self.shards}
        metadata = croissant.describe(name, self.name, found["rows"], self.task.schema, entries)
        storage.write_json(storage.join(self.output, croissant.FILE), metadata)
        text = croissant.card(name, self.name, found, self.task.schema)
        storage.write_bytes(storage.join(self.output, croissant.CARD), text.encode())


def _entry(record: ShardRecord) -> dict[str, Any]:
    """What the manifest says of a shard."""
    held: dict[str, Any] = dict(record)
    return {
        name: held[name] for name in ("sha256", "size", "sha256_pieces", "rows") if name in held
    }


def verify(output: str) -> dict[str, Any]:
    """Compare the SHA-256 of every shard with the manifest, and return the manifest.

    Raises StorageError for the first shard that differs.
    """
    manifest = atomic_folder.open_folder(output, MANIFEST)
    try:
        atomic_folder.verify_folder(output, manifest)
    except storage.StorageError as error:
        raise storage.StorageError(
            f"{error}: remove that file and give the same prepare command, which then writes "
            "it alone"
        ) from None
    return manifest


def write_shard(make: Callable[[Any, Path], ShardResult], uri: str, payload: Any) -> ShardRecord:
    """Make and write one shard; return its record."""
    with storage.scratch_folder() as scratch:
        result = make(payload, Path(scratch))
        entry = s3.call("read", result.file, atomic_folder.entry_of_file, result.file)
        storage.write_file(uri, result.file)
    record: dict[str, Any] = {**entry, "rows": result.rows, "broken": result.invalid}
    if result.amounts:
        record["amounts"] = result.amounts
    return cast(ShardRecord, record)
