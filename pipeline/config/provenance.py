"""Record what made a result: a hash of the code it depends on, and the versions of the libraries.

Every bundle and every trial's record keeps both. Results of other code or other versions are kept
and marked, never reused in silence; ``--remake changed`` makes them anew. Whether two results may
be compared follows from the same records.

The code is hashed in parts. The part of a registered component (a technique, an objective, ...)
consists of those definitions of its file that its class reaches. Each further module is a part of
its own. Parts are found by reading the sources and following their imports of our own modules, so
nothing is imported, a plugin's modules count as ours do, and where the package lies does not
matter.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, NotRequired, TypedDict, cast

from pipeline.config import registry
from pipeline.config.plugins import source_file
from pipeline.io.json_values import Json, as_object

LIBRARIES = ("torch", "torchvision", "torchaudio", "timm", "transformers", "peft")
"""Libraries that compute numbers: another version of one of them may give other results."""

SOURCE_CODE = ("pipeline.train.source", "pipeline.train.pretrain")
CHECKPOINT_CODE = (
    "pipeline.checkpoints.pretrained",
    "pipeline.checkpoints.hf_text",
    "pipeline.checkpoints.hf_speech",
    "pipeline.checkpoints.hf_auto",
)
TRIAL_CODE = ("pipeline.transfer.targets", "pipeline.transfer.trial")
BASELINE_CODE = ("pipeline.transfer.targets", "pipeline.transfer.baseline_trials")
FROZEN_CODE = ("pipeline.transfer.cached_heads",)
OVERLAP_CODE = ("pipeline.transfer.overlap",)
"""Modules that a kind of result starts from.

In this order: a source, an imported checkpoint, a trial, a trial of a frozen backbone, and a trial
whose test rows leave out those of the sources. The loop, the optimiser, the plan, the loader, the
metrics and the evaluation are found by following their imports.
"""

MAKES_NO_NUMBERS = frozenset(
    {
        # files are moved and locked
        "pipeline.io.storage",
        "pipeline.io.s3",
        "pipeline.io.atomic_folder",
        "pipeline.io.run_lock",
        "pipeline.io.write_fence",
        "pipeline.io.file_identity",
        "pipeline.io.places",
        "pipeline.io.checksums",
        "pipeline.io.json_values",
        "pipeline.io.threads",
        # names and settings: what is set stands in the key of every source and trial
        "pipeline.config.registry",
        "pipeline.config.plugins",
        "pipeline.config.schema",
        "pipeline.config.yaml_loader",
        # refuses, warns, starts, stops, logs and prints
        "pipeline.train.config_checks",
        "pipeline.train.row_checks",
        "pipeline.train.launch",
        "pipeline.train.log",
        "pipeline.train.progress",
        "pipeline.io.heartbeat",
        "pipeline.io.ray_environment",
        "pipeline.io.signals",
        "pipeline.io.wording",
        "pipeline.transfer.leaks",
        # describes results that are there
        "pipeline.report.results",
        "pipeline.report.trial_folder",
        "pipeline.report.subgroups",
        "pipeline.report.trial_record",
        "pipeline.train.resume_history",
        # reads other people's checkpoints: counted for the sources that start from one
        "pipeline.checkpoints.pretrained",
        "pipeline.checkpoints.hf_text",
        "pipeline.checkpoints.hf_speech",
        "pipeline.checkpoints.hf_auto",
        "pipeline.config.provenance",
    }
)
"""Modules that are skipped when imports are followed, unless a result starts from them.

Any other module of ours counts, also a new one.
"""

IMPORTED_BY_NAME = {
    "pipeline.simulation.environment": tuple(
        f"pipeline.simulation.{world}" for world in ("push", "range_world", "reach")
    )
}
"""Modules that a module imports without an import statement: the worlds that policies act in."""

WITHOUT_SOURCE = "without source"
"""Recorded for a module without Python source, such as a plugin's compiled one.

Its changes are not seen.
"""
NOT_RECORDED = "made before code and versions were recorded"

Component = tuple[str, str]
"""The (kind, name) of a registered component."""


class MadeBy(TypedDict):
    """The code that made something, as manifests and records store it."""

    hash: str
    code: dict[str, str]
    """As `Provenance.code`."""
    begun_by: NotRequired[list[ProvenanceRecord]]
    """Other code and versions that trained earlier parts of a source."""


class ProvenanceRecord(TypedDict):
    """A `Provenance` as it is stored."""

    made_by: MadeBy | None
    """None where it was not recorded."""
    versions: dict[str, str]
    parent_weights: NotRequired[str | None]
    """SHA-256 of the source's weights that a trial started from; None for scratch."""
    order: NotRequired[str]
    """Order of the training rows of a trial that is not complete yet."""


@dataclass(frozen=True)
class Provenance:
    """What made a source or a trial.

    Attributes:
        code: Hash of the normalised source, by part of the code.
        versions: Versions by library.
    """

    code: dict[str, str]
    versions: dict[str, str]

    @property
    def hash(self) -> str:
        """Return one hash for all the code, as the column ``made_by`` has it."""
        code = json.dumps(sorted(self.code.items()))
        return hashlib.sha256(code.encode()).hexdigest()[:12]

    @property
    def made_by(self) -> MadeBy:
        """Return the code as it is stored."""
        return {"hash": self.hash, "code": self.code}

    def metadata(self) -> ProvenanceRecord:
        """Return the two entries of a record or manifest that `from_metadata` reads."""
        return {"made_by": self.made_by, "versions": self.versions}


def from_metadata(record: Mapping[str, Any]) -> Provenance | None:
    """Return what a record or a bundle's manifest says of who made it.

    None where it was written before that was recorded.
    """
    made_by: Json = record.get("made_by")
    if not isinstance(made_by, dict):
        return None
    code = {part: str(found) for part, found in as_object(made_by["code"]).items()}
    versions = as_object(record.get("versions"))
    return Provenance(code, {name: str(versions[name]) for name in LIBRARIES if name in versions})


def changes(then: Provenance | None, now: Provenance) -> tuple[str, ...]:
    """Describe each part of the code and each library that differs between two provenances.

    Args:
        then: What made a result; None where that was not recorded.
        now: What would make it now.

    Returns:
        A phrase for each difference; empty where there is none.
    """
    if then is None:
        return (NOT_RECORDED,)
    out: list[str] = []
    for part in sorted(then.code.keys() | now.code.keys()):
        if part not in then.code:
            out.append(f"{part} is used now")
        elif part not in now.code:
            out.append(f"{part} is no longer used")
        elif then.code[part] != now.code[part]:
            out.append(f"{part} changed")
    return (*out, *_other_versions(then, now))


def differences(one: Provenance | None, other: Provenance | None) -> tuple[str, ...]:
    """Describe why two results that are compared were not made alike.

    Parts that only one of them uses (its technique) do not count.
    """
    if one is None and other is None:
        return ()
    if one is None or other is None:
        return ("of one of them it was not recorded what made it",)
    common = sorted(one.code.keys() & other.code.keys())
    differ = [f"{part} differs" for part in common if one.code[part] != other.code[part]]
    return (*differ, *_other_versions(one, other, "and"))


def _other_versions(then: Provenance, now: Provenance, between: str = "then, now") -> Iterator[str]:
    """Yield a phrase for each library whose version differs."""
    for name in LIBRARIES:
        before, after = then.versions.get(name, "unknown"), now.versions.get(name, "unknown")
        if before != after:
            yield f"{name} {before} {between} {after}"


@cache
def versions() -> dict[str, str]:
    """Return the installed version of each library that computes numbers."""
    by_package: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            by_package[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            by_package[name] = "not installed"
    return by_package


@cache
def made_by(modules: tuple[str, ...], components: tuple[Component, ...]) -> Provenance:
    """Return what makes a result now.

    Args:
        modules: Dotted names of the modules that it starts from.
        components: The registered components that it uses.
    """
    return Provenance(code_of(modules, components), versions())


def components_of(
    modality: str | None,
    arch: str,
    options: Mapping[str, Any],
    objective: str | None = None,
    technique: str | None = None,
) -> tuple[Component, ...]:
    """Return the registered components of a source or trial.

    Args:
        arch: library/model. An arch that names a checkpoint brings in no library.
        options: Options of the backbone. One that names a backbone itself (``vision:
            timm/resnet18``) brings in that library too.

    Metrics of plugins count for every source and trial, as all of this package's do.
    """
    libraries = {arch.partition("/")[0]} & registry.entries("model").keys()
    for value in options.values():
        library, slash, _ = value.partition("/") if isinstance(value, str) else ("", "", "")
        if slash and library in registry.entries("model"):
            libraries.add(library)
    out = [("modality", modality)] if modality else []
    out += [("model", library) for library in sorted(libraries)]
    if objective:
        theirs = registry.entries("metric").items()
        out += [("objective", objective)]
        out += [("metric", name) for name, entry in theirs if not entry.is_ours]
    out += [("technique", technique)] if technique else []
    return tuple(out)


# ---------------------------------------------------------------- the parts of the code


def code_of(modules: Iterable[str], components: Iterable[Component]) -> dict[str, str]:
    """Return a dict from part to hash: components, modules, and all that they import of ours."""
    out: dict[str, str] = {}
    waiting = list(modules)
    for kind, name in components:
        module = registry.entry(kind, name).module
        hashed, used = _component_source(module, kind, name)
        out[f"{kind} {name}"] = hashed
        waiting += [other for other in used if other not in MAKES_NO_NUMBERS]
    while waiting:
        module = waiting.pop()
        if module not in out:
            hashed, used = _module(module)
            out[module] = hashed
            waiting += [other for other in used if other not in MAKES_NO_NUMBERS]
    return dict(sorted(out.items()))


def forget() -> None:
    """Read the sources of modules anew when they are next asked for: one was edited."""
    for function in (source_file, _source, _module, _component_source):
        function.cache_clear()


@cache
def _source(module: str) -> ast.Module | None:
    """Return a module's syntax tree, or None where it has no Python source."""
    file = source_file(module)
    return ast.parse(file.read_bytes(), str(file)) if file else None


@cache
def _module(module: str) -> tuple[str, tuple[str, ...]]:
    """Return the hash of a whole module, and the modules of ours that it imports."""
    tree = _source(module)
    if tree is None:
        return WITHOUT_SOURCE, ()
    by_name = IMPORTED_BY_NAME.get(module, ())
    return _hash(tree.body), (*_own_modules(module, tree.body), *by_name)


@cache
def _component_source(module: str, kind: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the hash and the imports of that part of a module which a registered object reaches.

    Its neighbours in the file do not count.
    """
    tree = _source(module)
    if tree is None:
        return WITHOUT_SOURCE, ()
    body = _reachable_statements(tree, kind, name)
    return _hash(body), _own_modules(module, body)


def _reachable_statements(tree: ast.Module, kind: str, name: str) -> list[ast.stmt]:
    """Return the statements that define a registered object and all that it names, in order."""
    defines: dict[str, list[ast.stmt]] = {}
    always: list[ast.stmt] = []
    waiting: list[ast.stmt] = []
    for statement in tree.body:
        defined = list(_defined(statement))
        for each in defined:
            defines.setdefault(each, []).append(statement)
        if not defined:
            always.append(statement)
        if _registers(statement, kind, name):
            waiting.append(statement)
    found = {id(statement) for statement in always}
    while waiting:
        statement = waiting.pop()
        if id(statement) not in found:
            found.add(id(statement))
            named = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            waiting += [other for each in named for other in defines.get(each, ())]
    return [statement for statement in tree.body if id(statement) in found]


def _registers(statement: ast.stmt, kind: str, name: str) -> bool:
    """Return whether a statement registers the name."""
    call = registry.registration(statement)
    written = [getattr(argument, "value", None) for argument in call.args[:2]] if call else []
    return written == [kind, name]


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _own_modules(module: str, body: Iterable[ast.stmt]) -> tuple[str, ...]:
    """Return the modules that some statements import, in functions too, and that are our own.

    Ours are those of this package and of the plugin's package that ``module`` lies in.
    """
    roots = {"pipeline", module.partition(".")[0]}
    found: set[str] = set()
    for statement in body:
        for node in ast.walk(statement):
            found |= {
                name for name in _imported(module, node, roots) if name.partition(".")[0] in roots
            }
    found -= {module}
    return tuple(sorted(found))


def _imported(module: str, node: ast.AST, roots: set[str]) -> Iterator[str]:
    """Yield the modules that an import statement names.

    Members of other packages' modules are not told apart from modules.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        file = source_file(module)
        is_package = file is not None and file.name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        above = package.rsplit(".", node.level - 1)[0] if node.level else ""
        start = ".".join(part for part in (above, node.module) if part)
        for alias in node.names:
            inner = f"{start}.{alias.name}"
            yield inner if start.partition(".")[0] in roots and source_file(inner) else start


# ---------------------------------------------------------------- a hash of normalised source


def source_hash(text: str | bytes) -> str:
    """Return the hash of Python source, ignoring comments, docstrings and formatting.

    It is the same on every version of Python that can read the source.
    """
    return _hash(ast.parse(text).body)


def _hash(body: Iterable[ast.stmt]) -> str:
    words: list[str] = []
    imports: set[str] = set()
    for statement in body:
        _serialize_node(statement, words, imports)
    text = "\n".join([*sorted(imports), *words])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _fields(kind: type[ast.AST]) -> tuple[str, ...]:
    return tuple(sorted(name for name in kind._fields if name != "type_comment"))


def _serialize_node(node: Any, words: list[str], imports: set[str]) -> None:
    """Append a syntax tree as words, without what has no effect.

    Empty fields are left out, because later versions of Python have more of them. Imports are taken
    out of their places, because their order has no meaning, and collected in ``imports``.
    """
    if isinstance(node, ast.Constant):
        words.append(f"{type(node.value).__name__} {node.value!a}")
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        start = (
            f"from {'.' * node.level}{node.module or ''} "
            if isinstance(node, ast.ImportFrom)
            else ""
        )
        imports |= {
            f"{start}import {alias.name} as {alias.asname or alias.name}" for alias in node.names
        }
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        pass  # a docstring, of a module, a class, a function or a constant, or an ellipsis
    elif isinstance(node, (ast.Pass, ast.expr_context)):
        pass
    elif isinstance(node, ast.JoinedStr):
        words.append("(JoinedStr")
        for value in _joined(node.values):
            _serialize_node(value, words, imports)
        words.append(")")
    elif isinstance(node, ast.AST):
        words.append(f"({type(node).__name__}")
        for name in _fields(type(node)):
            _serialize_field(name, getattr(node, name, None), words, imports)
        words.append(")")
    else:
        words.append(ascii(node))  # a name, a number of dots, or the None of a dictionary's key


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """Return the parts of a formatted string, neighbouring texts joined and empty ones left out.

    Versions of Python cut these parts differently.
    """
    out: list[ast.expr] = []
    for value in values:
        last = out[-1] if out else None
        if isinstance(last, ast.Constant) and isinstance(value, ast.Constant):
            out[-1] = ast.Constant(f"{last.value}{value.value}")
        else:
            out.append(value)
    return [value for value in out if getattr(value, "value", None) != ""]


def _serialize_field(name: str, value: Any, words: list[str], imports: set[str]) -> None:
    """Append a field of a syntax tree's node, unless it is empty."""
    before = len(words)
    words.append(f".{name}")
    if isinstance(value, list):
        for item in cast("list[Any]", value):
            _serialize_node(item, words, imports)
    elif value is not None:
        _serialize_node(value, words, imports)
    if len(words) == before + 1:
        words.pop()
