"""The registry: names of modalities, models, objectives, techniques, metrics and other components.

A component is a class or function with a decorator, such as ``@register("technique", "lp_ft",
options=LPFTOptions)``, in the folder of its kind (`FOLDERS`) or in a plugin
(`pipeline.config.plugins`). Nothing else has to be edited. Names, options and column roles are read
from the sources, so a job file is checked in well under a second, before torch is imported; `get`
imports the one file that is needed.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config import familiar_names, plugins
from pipeline.config.plugins import Plugin
from pipeline.io.json_values import Json, as_list, as_object

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = {
    "modality": "modalities",
    "model": "models",
    "objective": "objectives",
    "technique": "techniques",
    "baseline": "transfer/baselines",
    "metric": "core/metrics",
    "score": "transfer/scores",
    "tracker": "transfer/trackers",
    "importer": "prepare/importers",
    "cohort": "prepare/cohorts",
    "export": "checkpoints/exports",
}
"""Each kind of component, and the folder or file of this package that holds those of ours."""
PATH_FORMAT = "uri-reference"
"""The ``format`` (of JSON Schema) of an option that names a file or folder."""
FOLDER_FILES = "x-files"
"""The key (of JSON Schema) with the names of the files that count in such a folder."""

T = TypeVar("T")


def reject_bool(value: Any) -> Any:
    """Return the value. Raises ValueError for true and false, which pydantic reads as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("true and false are no value here")
    return value


class Strict(BaseModel):
    """A frozen model that refuses undeclared keys, and booleans where none is declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        is_bool = "bool" in str(cls.model_fields[str(info.field_name)].annotation)
        return value if is_bool else reject_bool(value)


class Options(Strict):
    """Base of every options class.

    The classes that derive from it may use only builtin types, ``Literal`` and ``Field``: they are
    read without importing the file that holds them. An option that names a file says so, by
    ``Field(..., json_schema_extra={"format": "uri-reference"})``: it is then relative to the job
    file, as data are, and counts by what the file holds. One that names a folder also lists the
    files that count, ``"x-files": ["tokenizer.json"]``.
    """


class LayerOptions(Options):
    """Options of every technique that trains the backbone.

    Its options class derives from this one, or is this one. `pipeline.core.contracts.layer_rates`
    and `pipeline.train.optim` apply them: a technique's own code does not.
    """

    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer relative to the next one, from the head down; 0.65 to"
        " 0.9 keeps lower layers near the source (Clark et al. 2020; Bao et al. 2022)",
    )
    freeze: int | str | None = Field(
        None,
        description="layers of the backbone that are not trained, from the input on: their "
        "number, or the name of the last one",
    )
    freeze_norm_stats: bool = Field(
        False,
        description="whether batch norms keep the running statistics of the source; for small "
        "batches and few rows",
    )


class AdaptationOptions(LayerOptions):
    """Options of techniques that compare rows of the target with rows of its source."""

    weight: float = Field(1.0, gt=0, description="weight of the penalty, relative to the loss")
    source_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the mean loss of the source's labelled rows; 0: the rows are read "
        "without labels, so that source and target may have different objectives, or not at all "
        "if the penalty needs only the target's rows",
    )


class LinearHeadOptions(Options):
    """Options of objectives whose head is one linear layer."""

    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(
        True,
        description="layer norm without parameters before the linear layer, so that one learning "
        "rate fits every backbone",
    )

    @property
    def drops_features(self) -> bool:
        return self.dropout > 0


class ClassHeadOptions(LinearHeadOptions):
    """Options of objectives whose linear head has a score for each class or label."""

    focal: float = Field(
        0.0,
        ge=0,
        description="training only: gamma of the focal loss, (1 - p) ** gamma times the "
        "cross-entropy (Lin et al. 2017; 2 there)",
    )
    calibrate: Literal["none", "temperature"] = Field(
        "none",
        description="temperature: after training one scalar that all scores are divided by is "
        "fitted on the validation rows (Guo et al. 2017); test metrics and predict use it",
    )


class BoxOptions(Options):
    """Options of objectives that find objects: how their boxes are written, and the detector."""

    box_format: Literal["xyxy", "xywh", "cxcywh"] = Field(
        "xyxy",
        description="what the boxes column holds: corners; corner and size (COCO); centre and size",
    )
    relative: bool = Field(
        True,
        description="boxes are shares of the image (0 to 1); false: pixels, for which the width "
        "and height columns are needed",
    )
    names: list[str] | dict[int | str, str] | None = Field(
        None,
        description="class names: a list (by number from 0) or number: name; without it the "
        "classes are the values of the training rows, sorted",
    )
    max_boxes: int = Field(100, ge=1, description="an image with more boxes is left out")
    channels: int = Field(
        256, ge=64, multiple_of=32, description="width of the pyramid and the heads"
    )
    anchor: float = Field(
        8.0,
        gt=0,
        description="Faster and Mask R-CNN: side of the anchors of a level in its strides; less "
        "for small images",
    )
    score_threshold: float = Field(
        0.05, ge=0, lt=1, description="detections with a lower score are dropped"
    )
    nms_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of two detections of a class that overlap more than this, the one with the "
        "higher score is kept; none: 0.6 for fcos, else 0.5",
    )


class MaskOptions(Options):
    """Options of importers that may write a mask for each box."""

    masks: Literal["none", "instance"] = Field(
        "none",
        description="instance: also a column masks, the mask of each box as COCO's run lengths",
        exclude_if=lambda masks: masks == "none",  # outputs have the key that they always had
    )


class RecordingOptions(Options):
    """Options of importers that may cut recordings."""

    rate: int = Field(
        0,
        ge=0,
        description="recordings: samples a second to write, as FLAC; 0: each recording's own, "
        "whole files as they are",
    )
    longest: float = Field(
        30.0,
        ge=1,
        description="recordings: seconds; a longer one is cut into rows, but broken where it has a "
        "transcript",
    )
    cut: Literal["silence", "windows"] = Field(
        "silence",
        description="recordings: silence: cut at the quietest place of the second half; windows: "
        "cut into equal pieces",
    )
    mono: bool = Field(
        False,
        description="recordings: those of several channels are written anew as the mean of them, "
        "as FLAC",
    )


class BenchmarkOptions(Options):
    """Options of cohorts that may leave out what the benchmark on MIMIC-III leaves out."""

    exclude: Literal["benchmark", "none"] = Field(
        "benchmark",
        description="benchmark: MIMIC-III stays as Harutyunyan et al. 2019: adults, one ICU stay "
        "in the admission and no move between ICUs; none: all stays",
    )


class SplitOptions(Options):
    """Options of importers that take each row's split from its file or from a column."""

    split_column: str = Field(
        "",
        description="the column (its name in the file) that tells each row's split, in place of "
        "the file's name or folder",
    )
    split: Literal["", "train", "validation", "test"] = Field(
        "", description="the split of all files; empty: from the file's name or folder, else train"
    )


class DelimitedOptions(SplitOptions):
    """Options of importers that read CSV and TSV files of any dialect."""

    delimiter: str = Field(
        "", description="one character, or tab; empty: tab for .tsv and .tab, else a comma"
    )
    quote: str = Field(
        '"', description="what encloses fields; empty: nothing does, every line is a row"
    )
    encoding: str = Field(
        "utf-8", description="of the files, such as latin-1; one in which ASCII is ASCII"
    )
    names: str = Field(
        "", description="names of all columns for files without a header, such as age,sex,died"
    )


SHARED_OPTIONS: dict[str, type[Options]] = {
    shared.__name__: shared
    for shared in (
        Options,
        LayerOptions,
        AdaptationOptions,
        LinearHeadOptions,
        ClassHeadOptions,
        BoxOptions,
        MaskOptions,
        RecordingOptions,
        BenchmarkOptions,
        SplitOptions,
        DelimitedOptions,
    )
}
"""Classes that options classes may derive from without importing them."""


class Registered:
    """What ``register`` sets on every class."""

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]


@dataclass(frozen=True)
class Entry:
    """Where a component is declared, and what its source says of it."""

    kind: str
    name: str
    module: str
    options: type[Options]
    roles: tuple[str, ...] = ()
    """Column roles that it needs."""
    optional_roles: tuple[str, ...] = ()
    """Column roles that it reads where they are given."""
    title: str = ""
    """How tables call it; empty: by its name."""
    attribute: str = ""
    """Name of the class or function in its module."""
    documentation: str = ""
    """Its docstring."""
    file: Path = Path()
    line: int = 0

    @property
    def is_ours(self) -> bool:
        """Whether it is part of this package, not of a plugin."""
        return self.module.partition(".")[0] == "pipeline"

    @property
    def path_options(self) -> dict[str, tuple[str, ...]]:
        """Options that name a file or folder, with the files that count in such a folder."""
        files_of_option: dict[str, tuple[str, ...]] = {}
        for name, field in self.options.model_fields.items():
            extra = as_object(field.json_schema_extra)
            if extra.get("format") == PATH_FORMAT:
                files_of_option[name] = tuple(
                    str(file) for file in as_list(extra.get(FOLDER_FILES))
                )
        return files_of_option


def register(kind: str, name: str, options: type[Options] = Options, title: str = ""):
    """Declare a class, function or metric as a component.

    Args:
        kind: One of `FOLDERS`.
        name: The name in job files, written out.
        options: The class of its options, in the same file, or one of `SHARED_OPTIONS`.
        title: How tables call it, where that is not the name.
    """
    if kind not in FOLDERS:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(FOLDERS)}")

    def declare(thing: T) -> T:
        thing.registered_name, thing.options_class = name, options  # type: ignore[attr-defined]
        return thing

    return declare


# ---------------------------------------------------------------- reading a source


def registration(node: ast.AST) -> ast.Call | None:
    """Return the ``register(...)`` call that decorates a definition, if there is one."""
    for decorator in getattr(node, "decorator_list", ()):
        if not isinstance(decorator, ast.Call):
            continue
        function = decorator.func
        if "register" in (getattr(function, "id", None), getattr(function, "attr", None)):
            return decorator
    return None


def _declared(module: str, file: Path) -> Iterator[Entry]:
    """Yield the components of a source file, which is not imported."""
    try:
        text = file.read_text(encoding="utf-8")
        if "register(" not in text:
            return
        tree = ast.parse(text, str(file))
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{file}:{line}: cannot be read as Python: {error}") from None
    for node in tree.body:
        call = registration(node)
        if call is None:
            continue
        where = f"{file}:{call.lineno}"
        kind, name, title = _literals(call, where)
        if kind not in FOLDERS:
            raise ValueError(f"{where}: unknown kind {kind!r}; {nearest(kind, FOLDERS)}")
        options = next((word.value for word in call.keywords if word.arg == "options"), None)
        yield Entry(
            kind,
            name,
            module,
            options=_options_class(tree, options.id, file)
            if isinstance(options, ast.Name)
            else Options,
            roles=_roles(node, "roles", tree, file) or (),
            optional_roles=_roles(node, "optional_roles", tree, file) or (),
            title=title,
            attribute=getattr(node, "name", ""),
            documentation=_documentation(node),
            file=file,
            line=call.lineno,
        )


def _documentation(node: ast.stmt) -> str:
    is_documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
    return (ast.get_docstring(node) or "") if is_documented else ""


def _literals(call: ast.Call, where: str) -> tuple[str, str, str]:
    """Return the kind, name and title that a ``register`` call writes out."""
    title = next((word.value for word in call.keywords if word.arg == "title"), ast.Constant(""))
    values = [getattr(part, "value", None) for part in (*call.args[:2], title)]
    if len(values) != 3 or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"{where}: write the kind and the name out, "
            'such as @register("technique", "lp_ft"): this file is read without being imported'
        )
    kind, name, title_text = map(str, values)
    return kind, name, title_text


def _options_class(tree: ast.Module, name: str, file: Path) -> type[Options]:
    """Return the pydantic class ``name``, compiled alone out of a file that is not imported."""
    if name in SHARED_OPTIONS:
        return SHARED_OPTIONS[name]
    if name not in {node.name for node in _classes(tree)}:
        raise ValueError(f"{file}: options class {name} must stand in the same file")
    space: dict[str, Any] = {
        **SHARED_OPTIONS,
        "Field": Field,
        "Literal": Literal,
        "model_validator": model_validator,
        "__name__": f"{file.stem}.options",
    }
    wanted: list[ast.stmt] = [node for node in _classes(tree) if _is_options(node, tree)]
    module = ast.Module(body=wanted, type_ignores=[])
    try:  # the same source that an import would run; types are evaluated now, not kept as text
        exec(compile(module, str(file), "exec", dont_inherit=True), space)
    except NameError as error:
        raise ValueError(
            f"{file}: options classes may use builtin types, Literal and Field only, "
            f"as they are read without importing this file ({error})"
        ) from None
    except Exception as error:  # whatever somebody's class body raises is a fault of that file
        raise ValueError(f"{file}: options class {name}: {type(error).__name__}: {error}") from None
    return space[name]


def _is_options(node: ast.ClassDef, tree: ast.Module) -> bool:
    bases = {getattr(base, "id", "") for base in node.bases}
    others = [other for other in _classes(tree) if other.name in bases and other is not node]
    return not bases.isdisjoint(SHARED_OPTIONS) or any(_is_options(other, tree) for other in others)


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _roles(
    node: Any,
    attribute: str,
    tree: ast.Module,
    file: Path,
) -> tuple[str, ...] | None:
    """Return the roles that a class attribute names: the class's own, or those of a base class in
    the same file; None when neither has the attribute.

    Raises ValueError when they are not written out, since the file is not imported.
    """
    for item in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(item, ast.Assign):
            targets = item.targets
        elif isinstance(item, ast.AnnAssign):
            targets = [item.target]
        else:
            continue
        if item.value is None or attribute not in {getattr(target, "id", "") for target in targets}:
            continue
        try:
            value: object = ast.literal_eval(item.value)
        except ValueError:
            value = None
        if not _is_texts(value):
            raise ValueError(
                f"{file}:{item.lineno}: {attribute} must be a tuple of texts written out, "
                "as this file is read without being imported"
            )
        return value
    named = {other.name: other for other in _classes(tree) if other is not node}
    for base in getattr(node, "bases", ()):
        if isinstance(base, ast.Name) and base.id in named:
            inherited = _roles(named[base.id], attribute, tree, file)
            if inherited is not None:
                return inherited
    return None


def _is_texts(value: object) -> TypeGuard[tuple[str, ...]]:
    return isinstance(value, tuple) and all(
        isinstance(item, str) for item in cast("tuple[object, ...]", value)
    )


# ---------------------------------------------------------------- looking up


def entries(kind: str) -> dict[str, Entry]:
    """Return every component of a kind by its name: this package's in the order of file and line,
    then those of plugins.

    Raises:
        ValueError: a name stands twice, or a source does not say what it must.
    """
    return _entries(kind, plugins.active())


@cache
def _entries(kind: str, of: tuple[Plugin, ...]) -> dict[str, Entry]:
    by_name: dict[str, Entry] = {}
    of_plugins = (
        component for plugin in of for component in _of_plugin(plugin) if component.kind == kind
    )
    for component in (*_ours(kind), *of_plugins):
        if component.name in by_name:
            other = by_name[component.name]
            place = other.module if other.is_ours else f"{other.file}:{other.line}"
            where = f"{component.file}:{component.line}"
            raise ValueError(f"{where}: {kind} {component.name!r} is already declared in {place}")
        by_name[component.name] = component
    return by_name


@cache
def _ours(kind: str) -> tuple[Entry, ...]:
    """Return the components of a kind in this package, in the order of file and line."""
    place = PACKAGE / FOLDERS[kind]
    components: list[Entry] = []
    for file in [place] if place.suffix else sorted(place.glob("*.py")):
        module = ".".join(("pipeline", *file.relative_to(PACKAGE).with_suffix("").parts))
        components += _declared(module, file)
    for component in components:
        if component.kind != kind:
            where = f"{component.file}:{component.line}"
            raise ValueError(f"{where}: a {component.kind} is registered in the folder of {kind}s")
    return tuple(components)


@cache
def _of_plugin(plugin: Plugin) -> tuple[Entry, ...]:
    """Return the components of all kinds of a plugin.

    Raises ValueError where there is none, and no file that names gymnasium (which may register an
    environment).
    """
    modules = list(plugins.sources(plugin))
    components = tuple(
        component for module, file in modules for component in _declared(module, file)
    )
    if not components and not any(_names_gymnasium(file) for _, file in modules):
        raise ValueError(
            f"{plugin.named_by}: nothing is registered in {modules[0][1]}; "
            "decorate its components with @register(kind, name)"
        )
    return components


def environment_plugins() -> tuple[str, ...]:
    """Return the modules of plugins in use that name gymnasium: they may register environments."""
    return tuple(
        module
        for plugin in plugins.active()
        for module, file in plugins.sources(plugin)
        if _names_gymnasium(file)
    )


def _names_gymnasium(file: Path) -> bool:
    return b"gymnasium" in file.read_bytes()


def names(kind: str) -> list[str]:
    return sorted(entries(kind))


def message_of(error: Exception) -> str:
    """Return the message of an error, and of pydantic's only what it says of the first value."""
    if not isinstance(error, ValidationError):
        return str(error)
    return without_prefix(error.errors()[0]["msg"])


def without_prefix(message: str) -> str:
    """Return what pydantic says of a value without the words that it puts before our messages."""
    return message.removeprefix("Value error, ")


def nearest(value: str, valid: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return ``did you mean a or b?``, or the list of valid names, for error messages.

    Args:
        value: What was written.
        valid: The names that may stand there.
        also: Names that may be meant and stand elsewhere.
    """
    valid = sorted(valid)
    close = [*close_names(value, valid), *also]
    if close:
        return f"did you mean {' or '.join(map(_visible, dict.fromkeys(close)))}?"
    shown = valid if len(valid) <= 20 else [*valid[:20], f"... ({len(valid)} in all)"]
    return f"valid names: {', '.join(shown)}"


def _visible(name: str) -> str:
    """Return a name in quotes where blanks at its ends would not be seen."""
    return name if name == name.strip() else repr(name)


def close_names(value: str, valid: Iterable[str]) -> list[str]:
    """Return the valid names that mean the same in other tools, or else those like the value."""
    valid = sorted(valid)
    if same := [name for name in valid if name.strip().lower() == value.strip().lower()]:
        return same
    familiar = [name for name in familiar_names.same_thing(value) if name in valid]
    close = familiar or difflib.get_close_matches(value, valid, n=3, cutoff=0.6)
    is_telling = len(value) > 2  # one or two letters are part of many names
    parts = [name for name in valid if value.lower() in name.lower()] if is_telling else []
    return close or parts[:3]


def backbone_advice(name: str) -> str:
    """Return what to write instead of a backbone's name without a known library.

    The text is the end of an error message: it begins with "; did you mean ..." or ": write ...".
    """
    meant = backbones_meant(name)
    advice = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return (
        f"{advice or ':'} write library/model, e.g. timm/resnet18, with a library of "
        f"{', '.join(names('model'))}"
    )


def backbones_meant(name: str) -> list[str]:
    """Return the names in a job for a model's name in another tool, or for a folder.

    The names of libraries come first, then the checkpoint of a hub.
    """
    name = name.removeprefix("https://huggingface.co/").strip("/") if "://" in name else name
    if name.startswith((".", "/", "~")):
        return [f"hf:{name} (a folder of Hugging Face)", f"bundle:{name}"]
    model = name.rpartition("/")[2].lower()
    libraries = names("model")
    forms = dict.fromkeys((model, model.replace("-", "_"), model.replace("-", "")))
    meant: list[str] = []
    for library in libraries:
        with suppress(ValueError):  # its package is not installed
            model_names = architectures(library)
            meant += [f"{library}/{form} (random weights)" for form in forms if form in model_names]
            if library == "timm":
                meant += [
                    f"timm-hub:{form} (published weights)" for form in forms if form in model_names
                ]
    is_read = any(model.startswith(prefix) for prefix in architectures("transformers"))
    if is_read or "/" in name:
        meant.append(f"hf-hub:{name} (published weights)")
    return meant


def entry(kind: str, name: str) -> Entry:
    """Return the declaration of a name. Raises ValueError with the nearest valid names."""
    declared = entries(kind)
    if name not in declared:
        unsupported = kind in ("objective", "metric") and familiar_names.why_unsupported(name)
        raise ValueError(f"unknown {kind} {name!r}; {unsupported or nearest(name, declared)}")
    return declared[name]


def roles(kind: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (required, optional) column roles of a modality or objective.

    Raises:
        ValueError: the name is unknown; the nearest valid names are given.
    """
    component = entry(kind, name)
    return component.roles, component.optional_roles


def path_options(kind: str, name: str) -> dict[str, tuple[str, ...]]:
    """Return `Entry.path_options` of a component; none of an unknown name."""
    known = entries(kind)
    return known[name].path_options if name in known else {}


def get(kind: str, name: str) -> Any:
    """Return the registered object. Its file is imported now if it was not yet."""
    component = entry(kind, name)
    try:
        module = importlib.import_module(component.module)
    except ImportError as error:
        if component.module.startswith("pipeline."):
            raise
        raise ValueError(
            f"{component.file}:{component.line}: {kind} {name!r} cannot be imported: {error}"
        ) from error
    return getattr(module, component.attribute)


def forget() -> None:
    """Read the files of components anew when they are next asked for: one was added or edited."""
    for function in (_entries, _ours, _architectures):
        function.cache_clear()


def architectures(library: str) -> frozenset[str]:
    """Return the model names of a model library, without importing it.

    Its file says in ``ARCHITECTURES`` either the names themselves, or ``(package, glob, regular
    expression)``: the names are then what the expression's group finds in the package's sources.
    """
    return _architectures(entry("model", library))


@cache
def _architectures(library: Entry) -> frozenset[str]:
    value = _constant(library, "ARCHITECTURES")
    if value is None:
        raise ValueError(f"{library.module} declares no ARCHITECTURES")
    return _scan(*value) if _is_texts(value) else frozenset(value)


def wanted_inputs(backbone: str) -> dict[str, Any]:
    """Return what a backbone (``library/model``) asks its modality for.

    Its file says it in ``WANTS``, by model name: ``{"wavenet": {"features": "wave"}}``. Empty for a
    model that asks for nothing, and for a checkpoint, which brings a modality of its own.
    """
    library, _, model = backbone.partition("/")
    if library not in entries("model"):
        return {}
    wanted = as_object(_constant(entry("model", library), "WANTS"))
    return dict(as_object(wanted.get(model)))


def _constant(library: Entry, name: str) -> Any:
    """Return a constant of a model library's file, which is not imported; None without it."""
    for node in _statements(library.file.read_text(encoding="utf-8")):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    return None


@cache
def _statements(source: str) -> list[ast.stmt]:
    """Return the statements of a source text: each text is parsed once."""
    return ast.parse(source).body


def modality_of(backbone: str) -> str | None:
    """Return the modality that a backbone (``library/model``) reads, where its file says it.

    It says so in ``MODALITY``: a name, or a name for each model.
    """
    library, _, model = backbone.partition("/")
    if library not in entries("model"):
        return None
    named: Json = _constant(entry("model", library), "MODALITY")
    modality = as_object(named).get(model) if isinstance(named, dict) else named
    return modality if isinstance(modality, str) else None


def split_tag(backbone: str) -> tuple[str, str]:
    """Return a backbone's name without the tag of its published weights, and the tag or "".

    ``timm/vit_small_patch16_224`` and ``dino`` of ``timm/vit_small_patch16_224.dino``. Libraries
    have tags whose file says in ``TAGS`` where they stand.
    """
    name, _, tag = backbone.partition(".")
    library = name.partition("/")[0]
    if not tag or library not in entries("model") or not _constant(entry("model", library), "TAGS"):
        return backbone, ""
    return name, tag


def tags(backbone: str) -> frozenset[str]:
    """Return the tags of a model's published weights, without importing its library.

    ``TAGS`` in its file has a package, a glob, and a regular expression with ``{model}`` whose
    group finds them in the package's sources.
    """
    library, _, model = backbone.partition("/")
    # timm makes its entries of models with QuickGELU from those of the same models with GELU
    model = model.replace("_quickgelu_", "_")
    package, pattern, expression = _constant(entry("model", library), "TAGS")
    return _scan(package, pattern, expression.replace("{model}", re.escape(model)))


def _scan(package: str, pattern: str, expression: str) -> frozenset[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"package {package} is not installed: install the project's dependencies "
            "(uv pip install -e .)"
        )
    finder = re.compile(expression, re.MULTILINE)
    files = Path(spec.origin).parent.glob(pattern)
    return frozenset(name for file in files for name in finder.findall(file.read_text()))
