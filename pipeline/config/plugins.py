"""Plugins: modules of other people that add components (techniques, metrics, ...) to this package.

A plugin is code, so it is taken from two places only: the entry points (group ``onetomany``) of
packages that are installed here, and the list ``plugins`` of a job file (``--plugin`` for commands
without a job). Nothing that is read as data, a bundle least of all, can name one.

The components of a plugin are found by reading its sources (`pipeline.config.registry`). It is
imported when one of its components is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

GROUP = "onetomany"
VARIABLE = "ONETOMANY_PLUGINS"
"""Environment variable with the modules of a job's list, joined by commas. Ray's workers read
it; the command line removes one that the user's shell has (`ignore_inherited`).
"""

_paths: dict[str, Path] = {}
"""File or folder by module, of plugins that were given as paths in this process."""


@dataclass(frozen=True)
class Plugin:
    """A module, or a package with all its modules, and who named it."""

    module: str
    named_by: str


def active() -> tuple[Plugin, ...]:
    """Return the installed plugins and those of the job in use."""
    listed = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    installed = installed_plugins()
    known = {plugin.module for plugin in installed}
    return (*installed, *(Plugin(name, f"plugin {name}") for name in listed if name not in known))


@cache
def installed_plugins() -> tuple[Plugin, ...]:
    by_name: dict[str, Plugin] = {}
    for point in metadata.entry_points(group=GROUP):
        package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        by_name.setdefault(point.module, Plugin(point.module, f"entry point {point.name}{package}"))
    return tuple(by_name.values())


def use(listed: Iterable[str], folder: str | Path = ".") -> None:
    """Make a job's plugins the ones in use, in this process and those that it starts.

    Args:
        listed: Module names, and paths of ``.py`` files and package folders. A path has a slash in
            it or ends in ``.py``.
        folder: What relative paths are relative to.

    Raises:
        ValueError: there is no such module or path, or its name is taken by another module.
    """
    names: list[str] = []
    for text in listed:
        name = _of_path(text, Path(folder)) if is_path(text) else _of_module(text)
        if name in names:
            raise ValueError(f"plugin {text}: {name} is listed twice")
        names.append(name)
    if names:
        os.environ[VARIABLE] = ",".join(names)
    else:
        os.environ.pop(VARIABLE, None)


def ignore_inherited() -> None:
    """Remove what this process inherited from a shell, which is no place to name code."""
    os.environ.pop(VARIABLE, None)


def is_path(text: str) -> bool:
    """Whether an item of ``plugins`` is a path, not the name of a module."""
    return "/" in text or text.endswith(".py")


def shipped() -> list[Path]:
    """Return the files and folders of the plugins in use that were given as paths."""
    return [_paths[plugin.module] for plugin in active() if plugin.module in _paths]


def _of_module(text: str) -> str:
    if source_file(text) is None:
        hint = f"; a path has a slash in it or ends in .py, such as ./{text}"
        raise ValueError(f"plugin {text}: no such module is installed here{hint}")
    return text


def _of_path(text: str, folder: Path) -> str:
    place = (folder / text).resolve()
    source = place / "__init__.py" if place.is_dir() else place
    if not source.is_file() or source.suffix != ".py":
        raise ValueError(
            f"plugin {text}: neither a .py file nor a folder with __init__.py (looked for {source})"
        )
    name = place.stem
    if not name.isidentifier():
        raise ValueError(
            f"plugin {text}: {name!r} cannot be the name of a module; "
            "use letters, digits and underscores"
        )
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))  # last: nothing beside it hides an installed package
    importlib.invalidate_caches()
    source_file.cache_clear()
    file = source_file(name)
    if file is None or file.resolve() != source:
        raise ValueError(
            f"plugin {text}: there is another module named {name} ({file or 'built in'}); "
            "give the plugin a name of its own"
        )
    _paths[name] = place
    return name


@cache
def source_file(module: str) -> Path | None:
    """Return the file with a module's source, found without importing the packages it lies in.

    Returns:
        None where there is no such module, or no Python source of it.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand, without a spec
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        place = Path(folder, *rest)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None


def sources(plugin: Plugin) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of each module of a plugin.

    Raises:
        ValueError: the plugin cannot be found.
    """
    root = source_file(plugin.module)
    if root is None:
        raise ValueError(f"{plugin.named_by}: module {plugin.module} cannot be found here")
    if root.name != "__init__.py":
        yield plugin.module, root
        return
    for file in sorted(root.parent.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        yield ".".join((plugin.module, *names)), file
