"""Find registered names (modalities, models, ...) by reading source files, not by importing them.

A file in ``pipeline/<kind folder>/`` that holds ``@register("technique", "lp_ft",
options=LPFTOptions)`` adds that name; nothing else has to be edited. Names, options and column
roles are known before torch is imported, so a job file is checked in well under a second. `get`
imports the one file that is needed.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PACKAGE = Path(__file__).parents[1]
FOLDERS = {
    "modality": "modalities",
    "model": "models",
    "objective": "objectives",
    "technique": "techniques",
    "importer": "prepare/importers",
    "cohort": "prepare/cohorts",
}


def reject_bool(value: Any) -> Any:
    """Return the value.

    Raise ValueError for true and false, which pydantic would read as 1 and 0.
    """
    if isinstance(value, bool):
        raise ValueError("true and false are no value here")
    return value


class Strict(BaseModel):
    """Base of frozen models that refuse keys and booleans which are not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value, info):
        is_bool = "bool" in str(cls.model_fields[info.field_name].annotation)
        return value if is_bool else reject_bool(value)


class Options(Strict):
    """Base of every options class.

    The classes that derive from it may use only builtin types, ``Literal`` and ``Field``: they are
    read without importing the file that holds them.
    """


@dataclass(frozen=True)
class Entry:
    """Where a name is declared.

    Attributes:
        module: Dotted name of its module.
        options: The declared options class.
        roles: Column roles that it must have.
        optional_roles: Column roles that it may have.
    """

    kind: str
    name: str
    module: str
    options: type[Options]
    roles: tuple[str, ...] = ()
    optional_roles: tuple[str, ...] = ()


_registered: dict[tuple[str, str], Any] = {}


def register(kind: str, name: str, options: type[Options] = Options):
    """Register the decorated class or function under ``(kind, name)``."""

    def keep(thing):
        if kind not in FOLDERS:
            raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(FOLDERS)}")
        thing.registered_name, thing.options_class = name, options
        _registered[kind, name] = thing
        return thing

    return keep


def _register_calls(tree: ast.Module):
    """Yield each decorated definition of a module with its ``register`` call."""
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", ()):
            if (
                isinstance(decorator, ast.Call)
                and getattr(decorator.func, "id", None) == "register"
            ):
                yield node, decorator


def _options_class(tree: ast.Module, name: str, file: Path) -> type[Options]:
    """Return the options class ``name``, compiled alone from a file that is not imported."""
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if not found:
        raise ValueError(f"{file}: options class {name} must stand in the same file")
    space: dict[str, Any] = {
        "Options": Options,
        "Field": Field,
        "Literal": Literal,
        "model_validator": model_validator,
        "__name__": f"{file.stem}.options",
    }
    wanted: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and _is_options(node, tree)
    ]
    module = ast.Module(body=wanted, type_ignores=[])
    # our own source, as an import would run it; annotations are evaluated, not kept as text
    exec(compile(module, str(file), "exec", dont_inherit=True), space)
    return space[name]


def _is_options(node: ast.ClassDef, tree: ast.Module) -> bool:
    """Return whether a class derives from Options, by way of classes of the same file."""
    bases = {getattr(base, "id", "") for base in node.bases}
    if "Options" in bases:
        return True
    return any(
        isinstance(n, ast.ClassDef) and n.name in bases and n is not node and _is_options(n, tree)
        for n in tree.body
    )


def _roles(node: Any, attribute: str, tree: ast.Module, file: Path) -> tuple[str, ...] | None:
    """Return the roles that a class attribute lists, or None when neither it nor a base has any.

    Raises:
        ValueError: They are not written out as a tuple of texts. The file is not imported.
    """
    for item in node.body if isinstance(node, ast.ClassDef) else ():
        targets = (
            item.targets
            if isinstance(item, ast.Assign)
            else [item.target]
            if isinstance(item, ast.AnnAssign)
            else []
        )
        if (
            attribute in {getattr(target, "id", "") for target in targets}
            and isinstance(item, (ast.Assign, ast.AnnAssign))
            and item.value
        ):
            try:
                value = ast.literal_eval(item.value)
            except ValueError:
                value = None
            if not isinstance(value, tuple) or not all(isinstance(role, str) for role in value):
                raise ValueError(
                    f"{file}:{item.lineno}: {attribute} must be a tuple of texts written out, "
                    "as this file is read without being imported"
                )
            return value
    named = {
        other.name: other
        for other in tree.body
        if isinstance(other, ast.ClassDef) and other is not node
    }
    bases = [
        named[base.id]
        for base in getattr(node, "bases", ())
        if isinstance(base, ast.Name) and base.id in named
    ]
    return next(
        (found for base in bases if (found := _roles(base, attribute, tree, file)) is not None),
        None,
    )


@cache
def entries(kind: str) -> dict[str, Entry]:
    """Return every declared name of a kind, in the order of file and line."""
    folder = PACKAGE / FOLDERS[kind]
    out: dict[str, Entry] = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text())
        for node, call in _register_calls(tree):
            declared, name = (ast.literal_eval(argument) for argument in call.args[:2])
            if declared != kind:
                raise ValueError(
                    f"{file}:{call.lineno}: a {declared} is registered in the folder of {kind}s"
                )
            if name in out:
                raise ValueError(
                    f"{file}:{call.lineno}: {kind} {name!r} is already declared in "
                    f"{out[name].module}"
                )
            given = next((word.value for word in call.keywords if word.arg == "options"), None)
            options = (
                _options_class(tree, given.id, file) if isinstance(given, ast.Name) else Options
            )
            needed, optional = (
                _roles(node, attribute, tree, file) or ()
                for attribute in ("roles", "optional_roles")
            )
            out[name] = Entry(
                kind,
                name,
                f"pipeline.{FOLDERS[kind].replace('/', '.')}.{file.stem}",
                options,
                needed,
                optional,
            )
    return out


def names(kind: str) -> list[str]:
    """Return every declared name of a kind, sorted."""
    return sorted(entries(kind))


def nearest(value: str, valid) -> str:
    """Return ``did you mean a, b?`` or the list of valid names, for error messages."""
    valid = sorted(valid)
    close = (
        difflib.get_close_matches(value, valid, n=3, cutoff=0.6)
        or [v for v in valid if value.lower() in v.lower()][:3]
    )
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = valid if len(valid) <= 20 else [*valid[:20], f"... ({len(valid)} in all)"]
    return f"valid names: {', '.join(shown)}"


def entry(kind: str, name: str) -> Entry:
    """Return the declaration of a name. Raise ValueError with the nearest valid names."""
    known = entries(kind)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, known)}")
    return known[name]


def roles(kind: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (required, optional) column roles of a modality or objective.

    They are read from its source.

    Raises:
        ValueError: The name is unknown; the message has the nearest valid names.
    """
    found = entry(kind, name)
    return found.roles, found.optional_roles


def get(kind: str, name: str) -> Any:
    """Return the registered object, importing its file if that has not been done yet."""
    found = entry(kind, name)
    importlib.import_module(found.module)
    return _registered[kind, name]


@cache
def metrics() -> frozenset[str]:
    """Return the names of pipeline.metrics.catalog, read from its source."""
    return frozenset(
        re.findall(r"(?:_ratio|Metric)\(\s*\"(\w+)\"", (PACKAGE / "metrics/catalog.py").read_text())
    )


@cache
def architectures(library: str) -> frozenset[str]:
    """Return the model names that a model library knows, without importing it.

    A file in models/ says in ``ARCHITECTURES`` either the names themselves, or ``(package, glob,
    regular expression)``: the names are then what the expression's group finds in the package's
    sources.
    """
    found = entry("model", library)
    tree = ast.parse(PACKAGE.joinpath("models", found.module.rsplit(".", 1)[1] + ".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ARCHITECTURES":
            value = ast.literal_eval(node.value)
            if isinstance(value, tuple):
                return _scan(*value)
            return frozenset(value)
    raise ValueError(f"{found.module} declares no ARCHITECTURES")


def tags(model: str) -> frozenset[str]:
    """Return the names of a timm model's published weights, found in timm's sources.

    For example ``dino`` of ``vit_small_patch16_224.dino``. timm is not imported.
    """
    return _scan("timm", "models/*.py", rf"""^\s+['"]{re.escape(model)}\.(\w+)['"]:""")


def _scan(package: str, pattern: str, expression: str) -> frozenset[str]:
    """Return what the expression's group finds in the package's sources."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"package {package} is not installed: install the project's dependencies (uv sync)"
        )
    finder = re.compile(expression, re.MULTILINE)
    return frozenset(
        name
        for file in Path(spec.origin).parent.glob(pattern)
        for name in finder.findall(file.read_text())
    )
