"""Read a job file: YAML with line numbers, overrides, and all mistakes reported at once.

An unknown name is reported with the nearest right one. The rules of the text: a repeated key is
refused, ``1e-4`` is a number, ``no``, ``007`` and a date are texts, ``<<: *anchor`` merges (a
mapping's own keys win), ``${NAME}`` in values and keys comes from the environment, data paths are
relative to the job file, ``storage`` to the current folder, and ``--set a.b=c`` overrides any
field.

ruamel.yaml 0.19.1 (2026-12-03) would not make this smaller. It reads ``1e-4`` and ``no`` as wanted,
but ``007`` and dates as PyYAML does, and it stops at the first repeated key. The 65 jobs of this
repository take it 0.28 s, PyYAML 0.19 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml
from pydantic import ValidationError

from pipeline.config import familiar_names, plugins, registry
from pipeline.config.schema import (
    CHECKPOINT_PREFIXES,
    HUBS,
    ComponentConfig,
    Data,
    Fanout,
    Job,
    JobError,
    Select,
    Source,
    Spec,
    Target,
    Train,
    search_problems,
)
from pipeline.config.schema import schema as schema
from pipeline.io import s3, storage
from pipeline.io.json_values import Json, JsonObject, as_list, as_object

# ---------------------------------------------------------------- reading the text


class _Loader(yaml.SafeLoader):
    """YAML as its users mean it: 1e-4 is a number; 2026-10-01, no, 007 and 12:30 are texts.

    Attributes:
        lines: The line of each value, by its path.
        problems: Mistakes, each with its line.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.visited = 0
        self.lines: dict[Path_, int] = {}
        self.problems: list[tuple[int, str]] = []

    def refuse(self, line: int, path: Path_, what: str) -> None:
        """Note a mistake."""
        self.problems.append((line, f"{_dotted_path(path)}: {what}"))

    def visit(self) -> None:
        """Count a value. Raise YAMLError beyond `MAX_VALUES`."""
        self.visited += 1
        if self.visited > MAX_VALUES:
            raise yaml.YAMLError(
                f"more than {MAX_VALUES} values, once its aliases (*name) are written out; "
                "write fewer"
            )


_YAML = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)
"""Kinds of values that are no texts, what they look like, and their first characters.

YAML 1.1, which PyYAML reads, takes more for them: no and off for false, 007 for 7 in octal digits,
12:30 for 750 (minutes), 2026-10-01 for a date.
"""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return (tag, expression) of the values that are no texts, by their first character."""
    kept = (f"{_YAML}null", f"{_YAML}merge")
    resolvers = {
        first: [(tag, expression) for tag, expression in values if tag in kept]
        for first, values in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, expression, firsts in _SCALARS:
        for first in firsts:
            known = resolvers.setdefault(first, [])
            known.append((f"{_YAML}{kind}", re.compile(f"^({expression})$")))
    return resolvers


_Loader.yaml_implicit_resolvers = _resolvers()

Path_ = tuple[str | int, ...]
T = TypeVar("T", bound=Spec)
MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Most values of a job file once its aliases are written out.

A few lines of aliases of aliases can stand for 10^8 values.
"""
LONG_VALUE = 4
"""Letters from which on a variable's value is masked anywhere in an error message.

A shorter one is masked only where it is the whole value.
"""
SHOWN_MODELS = 20
"""Most models of a library that a message lists."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")
OF_ALL = ("decode", "shuffle", "max_bad_rows")
"""Fields of data that hold for all joined corpora."""


def _plain(node: yaml.Node, loader: _Loader, path: Path_) -> Json:
    """Return the value of a YAML node, noting the line of every part of it."""
    line = loader.lines[path] = node.start_mark.line + 1
    loader.visit()
    if len(path) > MAX_DEPTH:
        raise yaml.YAMLError("nested too deeply, or an alias that holds itself")
    if isinstance(node, yaml.MappingNode):
        out: JsonObject = {}
        for key, (line_of_key, value_node) in _pairs(node, loader, path).items():
            out[key] = _plain(value_node, loader, (*path, key))
            loader.lines[(*path, key)] = line_of_key
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, loader, (*path, i)) for i, child in enumerate(node.value)]
    untyped: Any = loader
    try:
        value: Json = untyped.construct_object(node)
    except (ValueError, LookupError, AttributeError) as error:
        # a text that looks like what it is not, or a tag that does not fit
        kind = node.tag.removeprefix(_YAML)
        what = f"{node.value!r} is no {kind} ({error}); put it in quotes if it is text"
        loader.refuse(line, path, what)
        return node.value
    return _expand_environment(value, loader, line, path) if isinstance(value, str) else value


def _pairs(
    node: yaml.MappingNode, loader: _Loader, path: Path_, depth: int = 0
) -> dict[str, tuple[int, yaml.Node]]:
    """Return a dict from key to (line, value) of a mapping: its merged keys (<<) and its own.

    Its own keys win, and of merged mappings the one that is named first.
    """
    own: dict[str, tuple[int, yaml.Node]] = {}
    merged: dict[str, tuple[int, yaml.Node]] = {}
    if depth > MAX_DEPTH:
        raise yaml.YAMLError("nested too deeply, or an alias that merges itself")
    merges = 0
    for key_node, value_node in node.value:
        loader.visit()
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            loader.refuse(line, path, "a key is a text, no list or mapping")
            continue
        key = _expand_environment(key_node.value, loader, line, path)
        merge = key_node.tag == f"{_YAML}merge"
        merges += merge
        if key in own or (merge and merges > 1):
            remedy = "write <<: [*one, *two]" if merge else "remove one"
            loader.refuse(line, (*path, key), f"this key stands here twice; {remedy}")
        if not merge:
            own[key] = (line, value_node)
            continue
        for base in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
            if isinstance(base, yaml.MappingNode):
                merged = {**_pairs(base, loader, path, depth + 1), **merged}
            else:
                what = "merges a mapping or a list of mappings, e.g. <<: *anchor"
                loader.refuse(line, (*path, key), what)
    return {**merged, **own}


def _expand_environment(text: str, loader: _Loader, line: int, path: Path_) -> str:
    """Return a text with the values of its ``${NAME}`` variables."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            what = f"environment variable {match[1]} is not set; set it or write the value"
            loader.refuse(line, path, what)
        return os.environ.get(match[1], match[0])  # left as it is, no other place is looked for

    return _VARIABLE.sub(value, text)


def _mask_environment(message: str, written: list[str]) -> str:
    """Return a message with ``${NAME}`` in the place of values from the environment.

    They may be secrets.

    Args:
        written: The texts of the job that may name variables.
    """
    names = dict.fromkeys(
        name for text in written for name in _VARIABLE.findall(text) if os.environ.get(name)
    )
    for name in sorted(names, key=lambda one: -len(os.environ[one])):
        value = os.environ[name]
        forms = {value, repr(value)[1:-1], os.path.normpath(value)}
        if len(value) < LONG_VALUE:
            message = message.replace(f"(got {value!r})", f"(got '${{{name}}}')")
            continue
        for form in sorted(
            (form for form in forms if len(form) >= LONG_VALUE), key=len, reverse=True
        ):
            message = message.replace(form, f"${{{name}}}")
    return message


def _dotted_path(path: Path_) -> str:
    """Return a place in the job as text."""
    return ".".join(str(part) for part in path) or "the job"


def parse(text: str, problems: list[tuple[int, str]]) -> tuple[JsonObject | None, dict[Path_, int]]:
    """Return the mapping that a job's text holds, and the line of each of its parts."""
    loader = _Loader(text)
    lines = loader.lines
    try:
        node = loader.get_single_node()
        data = _plain(node, loader, ()) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        written = text.splitlines()
        has_tab = mark and "\t" in written[min(mark.line, len(written) - 1)]
        tab = "; YAML is indented by spaces, this line holds a tab" if has_tab else ""
        message = f"not valid YAML: {getattr(error, 'problem', error)}{tab}"
        problems.append((mark.line + 1 if mark else 1, message))
        return None, lines
    except RecursionError:  # of yaml's own reader, before anything can be counted
        problems.append((1, "not valid YAML: nested too deeply"))
        return None, lines
    finally:
        problems += loader.problems
        loader.dispose()  # pyright: ignore[reportUnknownMemberType]
    if not isinstance(data, dict):
        problems.append((1, "a job is a mapping with name, sources and targets"))
        return None, lines
    return data, lines


def _apply_override(data: JsonObject, setting: str, problems: list[tuple[int, str]]) -> Path_:
    """Set the field that ``--set a.b=value`` names, and return its place; () where that fails."""
    dotted, equals, text = setting.partition("=")
    path = tuple(dotted.split("."))
    if not equals or not all(path):
        problems.append((0, f"--set {setting}: write --set a.b=value"))
        return ()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = _plain(node, loader, path) if node else None
    except yaml.YAMLError as error:
        problems.append(
            (0, f"--set {setting}: the value is not valid YAML: {getattr(error, 'problem', error)}")
        )
        return ()
    except RecursionError:
        problems.append((0, f"--set {dotted}: the value is nested too deeply"))
        return ()
    problems.extend((0, f"{message} (from --set {setting})") for _, message in loader.problems)
    steps: list[str | int] = []
    at: Json = data
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(at, list):
            items = cast("list[Json]", at)
            if not part.isdigit() or int(part) >= len(items):
                place = _dotted_path(path[:i])
                text = f"--set {setting}: {place} is a list of {len(at)}; write its index"
                problems.append((0, text))
                return ()
            index = int(part)
            steps.append(index)
            if last:
                items[index] = value
            at = items[index]
        elif isinstance(at, dict):
            steps.append(part)
            if last:
                at[part] = value
            elif at.get(part) is None:
                at[part] = {}
            at = at[part]
        else:  # a component written short: {name: {}} takes options
            shown = f"the text {at!r}" if isinstance(at, str) else f"{at!r}"
            text = f"--set {setting}: {_dotted_path(path[:i])} is {shown}, it has no fields"
            problems.append((0, text))
            return ()
    return tuple(steps)


def _settings_of_unknown_entries(
    set_by: dict[Path_, str], lines: dict[Path_, int], wrong: Iterable[Path_]
) -> Iterator[tuple[int, str]]:
    """Yield a mistake for each ``--set`` whose source or target is probably misspelt.

    ``--set`` may also add a source or target, so a name that the file lacks counts as misspelt only
    if what was added is not valid.

    Args:
        set_by: The settings by the path that they set.
        lines: The lines of the file by path.
        wrong: The paths that have mistakes.
    """
    wrong_entries = {path[:2] for path in wrong if path[:1] in (("sources",), ("targets",))}
    for path, setting in set_by.items():
        entry = path[:2]
        is_misspelt = len(path) > 2 and entry in wrong_entries and entry not in lines
        entries = [line for line in lines if len(line) == 2 and line[:1] == entry[:1]]
        names = [str(line[1]) for line in entries]
        if is_misspelt and names:
            kind, name = str(entry[0]).removesuffix("s"), str(entry[1])
            advice = registry.nearest(name, names)
            yield 0, f"--set {setting}: the file has no {kind} {name}; {advice}"


# ---------------------------------------------------------------- checks


def _fields_at(loc: Path_) -> list[str]:
    """Return the fields of the spec that a location points into, to name the nearest one."""
    kinds: dict[str, type[Spec]] = {
        "data": Data,
        "probe": Data,
        "unlabelled": Data,
        "more": Data,
        "train": Train,
        "fanout": Fanout,
        "select": Select,
    }
    named: dict[str, type[Spec]] = {"sources": Source, "targets": Target}
    spec: type[Spec] = named.get(str(loc[0]), Job) if len(loc) > 1 else Job
    for part in loc[2:] if spec is not Job else loc:
        spec = kinds.get(str(part), spec)
    return list(spec.model_fields)


def _advice(name: str, fields: Iterable[str], at: Path_) -> str:
    """Return what to do about an unknown field or option: the nearest names, where it belongs, or
    why nothing needs it.
    """
    fields = list(fields)
    if reason := familiar_names.why_not_needed(name):
        return reason
    meant = familiar_names.same_thing(name)
    elsewhere = [] if set(fields) & {*meant} else _places_of(name, at) or _options_named(name)
    # a name that is known from elsewhere is no misspelling of another one
    advice = registry.nearest(name, () if meant and elsewhere else fields, elsewhere)
    difference = familiar_names.difference(name)
    return f"{advice} ({difference})" if difference else advice


def _places_of(name: str, at: Path_) -> list[str]:
    """Return where in a job a field stands that is no field of the part at a place."""
    specs: dict[str, type[Spec]] = {}
    for group, spec in (("sources", Source), ("targets", Target)):
        inside, *entry = at[:2] or ("",)
        if inside == group or inside not in ("sources", "targets"):
            part = f"{group}.{entry[0] if inside == group and entry else 'NAME'}"
            specs |= {part: spec, f"{part}.train": Train, f"{part}.data": Data}
    specs |= {"fanout": Fanout, "fanout.select": Select}
    for one in (name, *familiar_names.same_thing(name)):
        found = [f"{place}.{one}" for place, spec in specs.items() if one in spec.model_fields]
        if found:
            return found
        if one in Job.model_fields:
            return [f"{one} of the job"]
    return []


def _options_named(name: str) -> list[str]:
    """Return the forms in which a job sets an option of this name; [] if no component has it."""
    for one in (name, *familiar_names.same_thing(name)):
        for kind, form in (
            ("modality", "modality: {{{}: {{{}: ...}}}}"),
            ("objective", "objective: {{{}: {{{}: ...}}}}"),
            ("technique", "techniques: [{{{}: {{{}: ...}}}}]"),
        ):
            known = registry.entries(kind)
            owners = [owner for owner in known if one in known[owner].options.model_fields]
            if owners:
                owners = ["full"] if "full" in owners else owners[:3]
                return [form.format(owner, one) for owner in owners]
    return []


FORMS = {
    "data": "data: {uri: FILE, modality: text, columns: {text: NAME, label: NAME}}",
    "columns": "columns: {text: NAME, label: NAME}, a role and its column",
    "sources": "a name for each source, and its fields below that",
    "targets": "a name for each target, and its fields below that",
    "train": "train: {steps: 100}, with a space after each colon",
    "fanout": "fanout: {seeds: 3}",
}
"""What to write where a field is a mapping."""


def _remedy(error: Any) -> str:
    """Return what to write instead of a value of the wrong type, or ""."""
    value, kind, at = error["input"], error["type"], error["loc"][-1:]
    if kind == "list_type" and isinstance(value, (str, int, float)):
        return f"; write [{value}]"
    if kind in ("dict_type", "model_type") and at and at[0] in FORMS:
        return f"; write {FORMS[at[0]]}"
    if kind in ("int_type", "float_type", "string_type") and isinstance(value, list):
        return "; write one value, not a list"
    if kind.endswith("_parsing") and re.fullmatch(r"[0-9.]+ ?%", str(value)):
        return f"; write {float(str(value).rstrip(' %')) / 100:g}"
    if kind == "string_pattern_mismatch" and at == ("name",):
        return "; use only letters, digits and . - _"
    return ""


def _describe_error(error: Any) -> str:
    """Return what pydantic says of a value, in our words."""
    value, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        *at, name = error["loc"]
        return f"unknown field; {_advice(str(name), _fields_at(tuple(at)), tuple(at))}"
    if kind == "missing":
        return "this field is required"
    message = registry.without_prefix(error["msg"])
    if kind in ("dict_type", "model_type"):
        message = "Input should be a mapping"
    elif kind == "string_pattern_mismatch" and error["loc"] == ("name",):
        message = "Input should be a name"
    is_named = repr(value) in message
    if is_named or isinstance(value, (dict, list)) or error["loc"][-1:] == ("[key]",):
        return message + _remedy(error)
    return f"{message} (got {value!r}){_remedy(error)}"


def _union_problems(error: ValidationError) -> list[tuple[Path_, str]]:
    """Return every wrong value once, with its place.

    pydantic reports each member of a union, under an invented part of the path.
    """
    out: dict[Path_, str] = {}
    unions: set[Path_] = set()
    places = [item["loc"] for item in error.errors()]
    wrong_keys = {place[:-1] for place in places if place[-1:] == ("[key]",)}
    for item in error.errors():
        made_up = [
            part in ("int", "float", "str", "bool", "[key]")
            or bool(re.fullmatch(r"(tuple|list|dict|literal)\[.*\]", str(part)))
            for part in item["loc"]
        ]
        loc = tuple(part for part, no_part in zip(item["loc"], made_up, strict=True) if not no_part)
        is_below_wrong_key = any(item["loc"][: len(key)] == key for key in wrong_keys)
        if is_below_wrong_key and item["loc"][-1:] != ("[key]",):
            continue  # the value of a wrong key
        text = _describe_error(item)
        out[loc] = f"{out[loc]}; or: {text}" if loc in out else text
        if made_up[-1:] == [True]:
            unions.add(loc)
    inner = {loc[:n] for loc in out for n in range(len(loc))}
    # not: "no number" of a list whose second item is wrong
    return [(loc, text) for loc, text in out.items() if loc not in unions & inner]


def _component_problems(kind: str, raw: Json, path: Path_) -> list[tuple[Path_, str]]:
    """Return what is wrong with a registered name and its options."""
    try:
        component = ComponentConfig.model_validate(raw)
    except ValidationError:
        return []  # reported with its place by the typed pass
    at = (*path, component.name) if isinstance(raw, dict) and component.name in raw else path
    name = component.name
    if kind == "model":
        if name.startswith(CHECKPOINT_PREFIXES):
            known = {
                field
                for library in registry.names("model")
                for field in registry.entry("model", library).options.model_fields
            }
            return [
                ((*at, one), f"unknown option of a backbone; {_advice(one, known, ())}")
                for one in component.options
                if one not in known
            ]
        library, slash, model = name.partition("/")
        if not slash or library not in registry.names("model"):
            return [(at, f"unknown backbone {name!r}{registry.backbone_advice(name)}")]
        try:
            known = registry.architectures(library)
        except ValueError as error:
            return [(at, str(error))]
        plain, tag = registry.split_tag(name)
        if plain.partition("/")[2] not in known:
            also = registry.backbones_meant(model) if library in ("hf", "transformers") else ()
            advice = registry.nearest(model, known, also)
            return [(at, f"unknown {library} model {model!r}; {advice}")]
        if tag and tag not in (tags := registry.tags(plain)):
            return [(at, f"{plain} has no weights tagged {tag!r}; {registry.nearest(tag, tags)}")]
        name = library
    try:
        options = registry.entry(kind, name).options
    except ValueError as error:
        return [(at, str(error))]
    out: list[tuple[Path_, str]] = []
    try:
        options.model_validate(component.options)
    except ValidationError as error:
        for item in error.errors():
            text = _describe_error(item)
            if item["type"] == "extra_forbidden":
                advice = _advice(str(item["loc"][-1]), options.model_fields, ())
                text = f"unknown option of {component.name}; {advice}"
            out.append(((*at, *item["loc"]), text))
    return out


def _input_problems(part: JsonObject, path: Path_) -> list[tuple[Path_, str]]:
    """Return what is wrong with how the rows of a checkpoint are read.

    That is its modality's options, and the tag of published weights where data decide.
    """
    out: list[tuple[Path_, str]] = []
    if part.get("modality") is not None:
        out += _component_problems("modality", part["modality"], (*path, "modality"))
    plain, tag = registry.split_tag(str(_name_of(part["backbone"])))
    if tag and part.get("data") is not None:
        text = (
            "a tag says how published weights read their images, and data.modality decides that "
            f"here: write {plain}"
        )
        out.append(((*path, "backbone"), text))
    return out


def _reading_problems(part: JsonObject, path: Path_) -> list[tuple[Path_, str]]:
    """Return what is wrong where a source's backbone reads rows of another modality."""
    backbone = str(_name_of(part.get("backbone")))
    named = _name_of(as_object(part.get("data")).get("modality"))
    reads = registry.modality_of(registry.split_tag(backbone)[0])
    if reads is None or named == reads or named not in registry.names("modality"):
        return []
    fitting = ", ".join(_backbones_of(str(named))) or "none is registered"
    text = f"{backbone} reads rows of modality {reads}, and data.modality is {named}"
    return [
        ((*path, "backbone"), f"{text}: take one that reads {named} ({fitting}), or say {reads}")
    ]


def _backbones_of(modality: str) -> list[str]:
    """Return the backbones that read a modality; of a long list of models the library alone."""
    out: list[str] = []
    for library in registry.names("model"):
        with suppress(ValueError):  # its package is not installed
            models = sorted(registry.architectures(library))
            shown = models if len(models) <= SHOWN_MODELS else models[:1]
            fitting = [one for one in shown if registry.modality_of(f"{library}/{one}") == modality]
            is_long = len(models) > SHOWN_MODELS
            out += [f"{library}/NAME" if is_long else f"{library}/{one}" for one in fitting]
    return out


def _checkpoint_problems(
    text: Json, path: Path_, folder: Path, elsewhere: bool
) -> list[tuple[Path_, str]]:
    """Return what is wrong with the place of a checkpoint."""
    if not isinstance(text, str) or not text.startswith(CHECKPOINT_PREFIXES):
        known = (
            f"{text!r} is no checkpoint; write one of {', '.join(CHECKPOINT_PREFIXES)} followed by "
            "a path"
        )
        return [(path, known)] if path[-1] == "init" and isinstance(text, str) else []
    prefix, uri = text.split(":", 1)
    problem = "" if prefix in HUBS else _uri_problem(uri, folder, elsewhere, globs=False)
    if not problem:
        return []
    return [(path, f"{prefix} {problem}; a hub name needs the prefix hf-hub: or timm-hub:")]


def _name_of(component: Json) -> Json:
    """Return the name of a component as it is written: alone, or with its options."""
    if isinstance(component, dict):
        return component.get("name", next(iter(component), None))
    return component


def _resolve_uri(uri: str, folder: Path) -> str:
    """Return a URI as it is, and a path relative to the job file as an absolute one.

    Raises:
        StorageError: It names no place.
    """
    if storage.is_remote(uri) or uri.startswith("file://"):
        return uri
    return str((folder / uri).resolve())


def _is_absolute(uri: str) -> bool:
    """Return whether a path or URI is absolute."""
    return uri.startswith("file:///") or Path(uri).is_absolute()


def _uri_problem(uri: str, folder: Path, elsewhere: bool, globs: bool = True) -> str:
    """Return what is wrong with a place of data or of a checkpoint, or "".

    "" too where a variable in it is not set, which is reported elsewhere.
    """
    if _VARIABLE.search(uri):
        return ""
    try:
        place = _resolve_uri(uri, folder)
        found = (
            storage.is_remote(place)
            or (elsewhere and _is_absolute(uri))
            or storage.exists(place)
            or (globs and storage.glob(place))
        )
    except storage.StorageError as error:
        return str(error)
    if found:
        return ""
    advice = ""
    if uri.startswith("~/"):
        advice = f"; write ${{HOME}}{uri[1:]}"
    elif "\\" in uri:
        advice = f"; write {uri.replace(chr(92), '/')}"
    elif globs and re.fullmatch(r"[\w-]+(/[\w-]+)?", uri) and not Path(place).parent.exists():
        advice = (
            "; if it is a data set of the Hugging Face hub, first run: "
            f"onetomany prepare hf {uri} -o FOLDER"
        )
    kind = "file, folder or glob" if globs else "path"
    return f"{uri}: no such {kind} (looked for {place}){advice}"


def _role_problems(rows: JsonObject, objective: Json, at: Path_) -> list[tuple[Path_, str]]:
    """Return unknown roles of columns, and required roles without a column.

    A probe has no objective, but a label. Unlabelled rows have neither, and the columns of the
    target unless they name their own.
    """
    columns = rows.get("columns", {})
    try:
        inputs, optional_inputs = registry.roles(
            "modality", ComponentConfig.model_validate(rows.get("modality")).name
        )
        labels, optional_labels = _label_roles(objective, at)
    except ValueError:
        return []  # an unknown name or a wrong shape, reported with its place elsewhere
    if not isinstance(columns, dict):
        return []
    required, place = dict.fromkeys((*inputs, *labels)), (*at, "columns")
    known = {*required, *optional_inputs, *optional_labels}
    if at[-1] == "unlabelled" and not columns:
        required = {}
    return [
        *(
            ((*place, role), f"unknown role; {registry.nearest(role, known)}")
            for role in columns
            if role not in known
        ),
        *(
            (place, f"role {role!r} has no column; say columns: {{{role}: NAME}}")
            for role in required
            if role not in columns
        ),
    ]


def _label_roles(objective: Json, at: Path_) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the roles of labels that rows must have, and those that they may have."""
    if at[-1] == "probe":
        return ("label",), ()
    if at[-1] == "unlabelled":
        return (), ()
    return registry.roles("objective", ComponentConfig.model_validate(objective).name)


def _search_problems(data: JsonObject) -> list[tuple[Path_, str]]:
    """Return what is wrong with the search, also while other parts of the job are wrong."""

    def valid(spec: type[T], raw: Json) -> T | None:
        try:
            return spec.model_validate({} if raw is None else raw)
        except ValidationError:
            return None  # reported by the typed pass

    fanout = as_object(data.get("fanout"))
    search = as_object(fanout.get("search"))
    if not search:
        return []
    trains = [
        train
        for part in _mappings(data.get("targets")).values()
        if (train := valid(Train, part.get("train")))
    ]
    fields = [
        one
        for name, values in search.items()
        if (one := valid(Fanout, {"trials": 2, "search": {name: values}}))
    ]
    count = valid(Fanout, {"trials": fanout.get("trials", 1), "search": {"lr": [1, 1]}})
    alone: list[tuple[Path_, str]] = (
        [(("fanout", "search"), "search needs trials above 1, e.g. trials: 8")]
        if count and count.trials == 1
        else []
    )
    return alone + [
        (("fanout", "search", name), text)
        for one in fields
        for name, text in search_problems(one.stated_search, trains)
    ]


def _mappings(value: Json) -> dict[str, JsonObject]:
    """Return the mappings among the values of a mapping."""
    return {name: entry for name, entry in as_object(value).items() if isinstance(entry, dict)}


def _corpora(part: JsonObject, path: Path_) -> Iterator[tuple[JsonObject, Path_]]:
    """Yield every mapping of a source or target that names rows, with its place.

    They are data, probe, unlabelled, and what is joined to them.
    """
    for field in ("data", "probe", "unlabelled"):
        rows = part.get(field)
        if not isinstance(rows, dict):
            continue
        yield rows, (*path, field)
        for i, more in enumerate(as_list(rows.get("more"))):
            if isinstance(more, dict):
                yield more, (*path, field, "more", i)


class _NamedUri(NamedTuple):
    """A text that names a place, and the field that it stands in."""

    text: str
    field: Path_
    replace: Callable[[str], None]
    """Write another text in its place."""


def _named_uris(rows: JsonObject) -> Iterator[_NamedUri]:
    """Yield every text that names a place.

    Args:
        rows: A data spec, or a mapping with an objective.
    """
    for field in ("uri", "train", "validation", "test"):
        named = rows.get(field)
        if isinstance(named, str):
            yield _NamedUri(named, (field,), partial(rows.__setitem__, field))
        listed = as_list(named)
        for i, text in enumerate(listed):
            if isinstance(text, str):
                yield _NamedUri(text, (field,), partial(listed.__setitem__, i))
    for kind in ("modality", "objective"):
        component = as_object(rows.get(kind))
        way = "options" if "name" in component else next(iter(component), "")
        name = component.get("name", way)
        options = as_object(component.get(way))
        for one in registry.path_options(kind, str(name)):
            text = options.get(one)
            if isinstance(text, str):
                yield _NamedUri(text, (kind, way, one), partial(options.__setitem__, one))


def _named_by(part: JsonObject) -> Iterator[_NamedUri]:
    """Yield every text of a source or target that names data, a tokenizer or a language model."""
    for rows, _ in _corpora(part, ()):
        yield from _named_uris(rows)
    yield from _named_uris({"objective": part.get("objective")})


def _data_problems(
    part: JsonObject, path: Path_, folder: Path, elsewhere: bool
) -> list[tuple[Path_, str]]:
    """Return what is wrong with the rows of a source or target."""
    out: list[tuple[Path_, str]] = []
    for rows, at in _corpora(part, path):
        if "modality" in rows:
            out += _component_problems("modality", rows["modality"], (*at, "modality"))
        out += [
            ((*at, *named.field), problem)
            for named in _named_uris(rows)
            if (problem := _uri_problem(named.text, folder, elsewhere))
        ]
        if at[-1] in ("data", "probe", "unlabelled"):
            out += _role_problems(rows, part.get("objective"), at)
        else:
            once = "said once, for all corpora that are joined, beside the first one's files"
            out += [((*at, field), once) for field in OF_ALL if field in rows]
        if at == ("targets", path[1], "data") and rows.get("decode") in ("workers", "device"):
            text = (
                "targets are decoded in memory or in the train worker: say decode: memory, train "
                "or auto"
            )
            out.append(((*at, "decode"), text))
    return out


def _name_problems(data: JsonObject, folder: Path, elsewhere: bool) -> list[tuple[Path_, str]]:
    """Return unknown names and roles, wrong options, searches and places.

    They are looked for in the raw mapping, so that they are found beside other mistakes.
    """
    out: list[tuple[Path_, str]] = _search_problems(data)
    components: list[tuple[str, Json, Path_]] = [
        (kind, component, (field, i))
        for field, kind in (("techniques", "technique"), ("baselines", "baseline"))
        for i, component in enumerate(as_list(data.get(field)))
    ]
    if data.get("tracking") is not None:
        components.append(("tracker", data["tracking"], ("tracking",)))
    remote = False
    try:
        place = data.get("storage")
        remote = isinstance(place, str) and s3.split(place)[0]
    except storage.StorageError as error:
        out.append((("storage",), str(error)))
    places = [
        (group, name) for group in ("sources", "targets") for name in _mappings(data.get(group))
    ]
    for at in places:
        group, name = at
        part = _mappings(data.get(group))[name]
        out += _data_problems(part, at, folder, elsewhere)
        if part.get("objective") is not None:
            components.append(("objective", part["objective"], (*at, "objective")))
            out += [
                ((*at, *named.field), problem)
                for named in _named_uris({"objective": part["objective"]})
                if (problem := _uri_problem(named.text, folder, elsewhere))
            ]
        if group == "sources" and part.get("technique") is not None:
            components.append(("technique", part["technique"], (*at, "technique")))
        if group == "sources" and "backbone" in part:
            place, backbone = (*at, "backbone"), part["backbone"]
            components.append(("model", backbone, place))
            out += _reading_problems(part, at)
            out += _checkpoint_problems(_name_of(backbone), place, folder, elsewhere)
            out += _input_problems(part, at)
        if group == "sources" and part.get("init") is not None:
            out += _checkpoint_problems(part["init"], (*at, "init"), folder, elsewhere)
        if remote and as_object(part.get("train")).get("trace_rows") is True:
            text = (
                f"rows are traced to local folders only, and storage is {data['storage']}; "
                "leave it out"
            )
            out.append(((*at, "train", "trace_rows"), text))
        for i, component in enumerate(as_list(part.get("techniques"))):
            components.append(("technique", component, (*at, "techniques", i)))
    for kind, component, place in components:
        out += _component_problems(kind, component, place)
    return out


def _plugin_problems(data: JsonObject, folder: Path) -> list[tuple[Path_, str]]:
    """Make the job's plugins the ones in use; what is wrong with them, those without fault stay."""
    out: list[tuple[Path_, str]] = []
    good: list[str] = []
    for i, text in enumerate(as_list(data.get("plugins"))):
        if not isinstance(text, str):
            continue  # reported by the typed pass
        try:
            plugins.use([*good, text], folder)
            for kind in registry.FOLDERS:
                registry.entries(kind)
            good.append(text)
        except ValueError as error:
            out.append((("plugins", i), str(error)))
    plugins.use(good, folder)
    return out


def _absolute(job: JsonObject, folder: Path) -> JsonObject:
    """Data paths, checkpoints and plugins made absolute: they are relative to the job file."""
    if "plugins" in job:
        job["plugins"] = [
            _resolve_uri(one, folder) if plugins.is_path(one) else one for one in _plugins(job)
        ]
    for part in _parts(job):
        for named in _named_by(part):
            named.replace(_resolve_uri(named.text, folder))
        for field in ("backbone", "init"):
            component = part.get(field)
            found = _checkpoint_place(component)
            if found is None:
                continue
            prefix, uri = found
            place = f"{prefix}:{_resolve_uri(uri, folder)}"
            part[field] = (
                {**ComponentConfig.model_validate(component).model_dump(), "name": place}
                if isinstance(component, dict)
                else place
            )
    return job


def _parts(job: JsonObject) -> list[JsonObject]:
    """Return the sources and targets of a job."""
    return [part for group in ("sources", "targets") for part in _mappings(job.get(group)).values()]


def _plugins(job: JsonObject) -> list[str]:
    """Return the plugins that a job names."""
    return [one for one in as_list(job.get("plugins")) if isinstance(one, str)]


def _checkpoint_place(component: Json) -> tuple[str, str] | None:
    """Return prefix and place of a checkpoint that lies at a path or URI; None for another name."""
    text = str(_name_of(component))
    prefix, _, place = text.partition(":")
    return (prefix, place) if text.startswith(CHECKPOINT_PREFIXES) and prefix not in HUBS else None


def load(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), elsewhere: bool = False
) -> Job:
    """Read, override and check a job file.

    Args:
        elsewhere: The job will run on other machines, so an absolute path need not exist here.

    Raises:
        JobError: Has every problem, each as ``file:line: field: what; fix``.
    """
    path = Path(path)
    return Job.model_validate(
        _absolute(_checked(path, overrides, elsewhere), path.parent.resolve())
    )


def relative_places(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """Return the files, folders and globs that a job names by paths relative to its file.

    They are plugins, data, checkpoints, tokenizers and language models.

    Raises:
        JobError: As for `load`.
    """
    job = _checked(Path(path), overrides, elsewhere=True)
    named = [one for one in _plugins(job) if plugins.is_path(one)]
    for part in _parts(job):
        named += [one.text for one in _named_by(part)]
        for field in ("backbone", "init"):
            found = _checkpoint_place(part.get(field))
            if found is not None:
                named.append(found[1])
    here = [
        place
        for place in named
        if not (storage.is_remote(place) or place.startswith("file://") or _is_absolute(place))
    ]
    return list(dict.fromkeys(here))


def field_lines(path: str | Path) -> dict[str, int]:
    """Return the line of each field of a job file, by its dotted place. The file must be there."""
    _, lines = parse(Path(path).read_text(encoding="utf-8"), [])
    return {_dotted_path(place): line for place, line in lines.items() if place}


def with_lines(path: str | Path, message: str, fields: Mapping[str, int]) -> str:
    """Return a message with ``file:line: `` before each of its lines that begins with a field of
    the job, such as ``targets.clothing.data.columns.label: ...``.

    Args:
        path: The job file.
        message: What is wrong, a line each.
        fields: The line of each field, as `field_lines` read them when the job was loaded.
    """

    def located(text: str) -> str:
        found = re.match(r"[^\s:,]+(?=[:,] )", text)
        parts = found[0].split(".") if found else []
        for count in range(len(parts), 0, -1):
            line = fields.get(".".join(parts[:count]))
            if line is not None:
                return f"{path}:{line}: {text}"
        return text

    return "\n".join(map(located, message.splitlines()))


def _checked(path: Path, overrides: list[str] | tuple[str, ...], elsewhere: bool) -> JsonObject:
    """Return a job file as an overridden mapping without mistakes, its places as written."""
    problems: list[tuple[int, str]] = []
    if path.suffix in (".csv", ".tsv", ".parquet", ".jsonl"):
        text = f"{path}: not a job file (.yaml); `onetomany init {path}` writes one for these data"
        raise JobError([text])
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError([f"{path}: no such job file"]) from None
    except IsADirectoryError:
        raise JobError([f"{path}: a folder; name the job file (.yaml)"]) from None
    except (UnicodeDecodeError, OSError) as error:
        raise JobError([f"{path}: cannot be read as UTF-8 text: {error}"]) from None
    data, lines = parse(text, problems)
    set_by: dict[Path_, str] = {}
    if data is not None:
        for setting in overrides:
            set_by[_apply_override(data, setting, problems)] = setting
        found = _plugin_problems(data, path.parent)
        found += _name_problems(data, path.parent, elsewhere)
        job = None
        try:
            job = Job.model_validate(data)
        except ValidationError as error:
            found += _union_problems(error)
        problems += _settings_of_unknown_entries(set_by, lines, [place for place, _ in found])
        for loc, message in dict.fromkeys(found):
            ancestors = [loc[:n] for n in range(len(loc), -1, -1)]  # itself first
            known = next((place for place in ancestors if place in lines), ())
            at = lines.get(known, 1)
            by = next(
                (
                    s
                    for p, s in set_by.items()
                    if p
                    and (
                        loc[: len(p)] == p
                        or (p[: len(loc)] == loc and loc not in lines)
                        or (len(known) < len(loc) and p[: len(known) + 1] == loc[: len(known) + 1])
                    )
                ),
                None,
            )
            problems.append(
                (
                    0 if by else at,
                    f"{_dotted_path(loc)}: {message}" + (f" (from --set {by})" if by else ""),
                )
            )
        if job is not None and not problems:
            return data
    problems = [
        (line, _mask_environment(message, [text, *overrides])) for line, message in problems
    ]
    raise JobError(
        [
            f"{path}:{line}: {message}" if line else f"{path}: {message}"
            for line, message in sorted(dict.fromkeys(problems))
        ]
    )
