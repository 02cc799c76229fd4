"""The rules of the house, read from the sources: layers, siblings, where Ray may be, no work at
import.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "pipeline").rglob("*.py"))
NAMES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in FILES
}
LAYERS = [
    {"io"},
    {"config"},
    {"core", "core.metrics"},
    {"media", "core.nn", "simulation"},
    {
        "modalities",
        "models",
        "objectives",
        "techniques",
        "transfer.baselines",
        "transfer.trackers",
        "data",
        "checkpoints",
    },
    {"train", "prepare", "report"},
    {"transfer"},
    {"api"},
    {"cli"},
    {"__main__"},
]
"""Folders of pipeline/ from the lowest layer to the highest; a folder imports those of lower
layers.
"""
INNER = {"core.metrics", "core.nn", "transfer.baselines", "transfer.trackers"}
"""Folders within a folder that have a layer of their own."""
SIBLINGS = {
    "modalities",
    "models",
    "objectives",
    "techniques",
    "transfer.baselines",
    "transfer.trackers",
}
"""Folders whose files do not import each other."""
RAY = (
    "pipeline.data.stream",
    "pipeline.train.launch",
    "pipeline.transfer.fanout",
)


def each_module(check):
    """Make a test of the check of one module: it checks all of them and lists what is wrong."""

    def test():
        wrong = []
        for module in NAMES:
            try:
                check(module)
            except AssertionError as error:
                wrong.append(f"{module}: {error}")
        assert not wrong, "\n".join(wrong)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


def part(module: str) -> str:
    """The house's name of a module: pipeline.data.plan is ``data``, pipeline.core.nn.losses is
    ``core.nn``.
    """
    names = module.split(".")[1:]
    inner = ".".join(names[:2])
    return inner if inner in INNER else "".join(names[:1])


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part(module) in names)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(NAMES[module].read_text(), str(NAMES[module]))


@cache
def imported(module: str) -> frozenset[str]:
    """Dotted names that a module imports, anywhere in it, also in functions and for type
    checking.
    """
    return frozenset(imported_within(module, tree(module)))


def imported_within(module: str, code: ast.AST) -> Iterator[str]:
    """Dotted names that a part of a module's code imports."""
    package = module if NAMES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            start = ".".join(filter(None, [base, node.module]))
            for name in node.names:
                yield f"{start}.{name.name}" if f"{start}.{name.name}" in NAMES else start
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from (
                str(argument.value)
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant)
            )


def called(node: ast.Call) -> str:
    """The last part of the name of what is called: ``f`` of ``a.b.f()``, empty of ``a[0]()``."""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def ours(module: str) -> set[str]:
    return {name for name in imported(module) if name in NAMES and name != "pipeline"} - {module}


def test_every_module_has_a_layer():
    known = set().union(*LAYERS)
    assert {part(module) for module in NAMES} - {""} <= known, "a new module: give it a layer here"
    assert known <= {part(module) for module in NAMES}


@each_module
def test_what_is_imported_is_there(module):
    missing = [
        name for name in imported(module) if name.startswith("pipeline.") and name not in NAMES
    ]
    assert not missing, f"{module} imports {missing}, which the package does not have"


def test_imports_are_seen():
    """This file's own reading of imports, on a text that has all kinds of them."""
    text = (
        "import ray.data\nfrom pipeline.io import s3, storage\nfrom . import plan\nfrom .plan "
        "import Plan\nfrom ..core.rng import mix\n"
        "def f():\n    import torch\n    __import__('pandas')\n    "
        "importlib.import_module('pipeline.cli')\n"
    )
    assert list(imported_within("pipeline.data.manifests", ast.parse(text))) == [
        "ray.data",
        "pipeline.io.s3",
        "pipeline.io.storage",
        "pipeline.data.plan",
        "pipeline.data.plan",
        "pipeline.core.rng",
        "torch",
        "pandas",
        "pipeline.cli",
    ]


@each_module
def test_imports_go_to_lower_layers_only(module):
    if module == "pipeline":
        assert ours(module) == {"pipeline.api"}, "its public functions, imported when they are used"
        return
    for other in ours(module):
        if part(other) == part(module):
            assert part(module) not in SIBLINGS or NAMES[other].name == "__init__.py", (
                f"{module} imports its sibling {other}"
            )
        else:
            assert layer(other) < layer(module), (
                f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})"
            )


def test_every_folder_says_what_it_may_import():
    folders = {module for module, file in NAMES.items() if file.name == "__init__.py"} - {
        "pipeline"
    }
    texts = {module: ast.get_docstring(tree(module)) or "" for module in folders}
    assert not [module for module, text in texts.items() if not re.search(r"[Ii]mports?\b", text)]


def test_importers_know_nothing_of_each_other():
    importers = {name for name, file in NAMES.items() if '@register("importer"' in file.read_text()}
    assert importers and not [
        (name, other) for name in importers for other in ours(name) & importers
    ]


def test_no_imports_go_in_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]):
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in sorted(ours(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in NAMES:
        visit(module, ())


@each_module
def test_ray_stays_in_its_places(module):
    if not module.startswith(RAY):
        assert not [name for name in imported(module) if name.split(".")[0] == "ray"], (
            "Ray is imported only in " + ", ".join(RAY)
        )


def test_the_job_file_is_checked_without_heavy_packages():
    light = {"pipeline.config.schema", "pipeline.config.registry", "pipeline.io.storage"}
    assert light <= set(NAMES)
    for module in NAMES:
        if module in light:
            top = {
                name.split(".")[0]
                for node in tree(module).body
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in imported_within(module, node)
            }
            assert not top & {
                "torch",
                "ray",
                "timm",
                "transformers",
                "numpy",
                "pyarrow",
                "pandas",
                "fsspec",
                "s3fs",
            }, module


@each_module
def test_module_level_code_only_defines(module):
    """Imports, definitions, constants, and settings of a class that the same file defines; nothing
    that does work at import.
    """
    body = tree(module).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    for node in body:
        where = f"{NAMES[module]}:{node.lineno}"
        if isinstance(node, ast.Expr):
            text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            of_class = (
                isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func).split(".")[0] in classes
            )
            function = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            assert text or of_class or (module, function) == ("pipeline", "gc.set_threshold"), where
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), where
        else:
            assert isinstance(
                node,
                (
                    ast.Import,
                    ast.ImportFrom,
                    ast.FunctionDef,
                    ast.AsyncFunctionDef,
                    ast.ClassDef,
                    ast.Assign,
                    ast.AnnAssign,
                ),
            ), where
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert not ast.unparse(target).startswith("os.environ"), where
            calls = {called(call) for call in ast.walk(node) if isinstance(call, ast.Call)}
            assert not calls & {
                "open",
                "read",
                "read_text",
                "read_bytes",
                "load",
                "init",
                "mkdir",
                "run",
                "Popen",
                "get_model",
                "create_model",
            }, where


@each_module
def test_broad_excepts_raise_again_or_say_why(module):
    broad = {"Exception", "BaseException", "everything"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if {ast.unparse(kind) if kind else "everything" for kind in kinds} & broad:
                again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                lines = range(node.lineno, node.body[0].lineno + 1)
                assert again or comment_lines(module) & set(lines), (
                    f"{NAMES[module]}:{node.lineno}: raise again, or say in a comment why "
                    "everything is caught"
                )


@cache
def comment_lines(module: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(NAMES[module].read_text()).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


@each_module
def test_files_say_what_they_are_for(module):
    assert ast.get_docstring(tree(module)), f"{NAMES[module]} has no docstring"
    assert NAMES[module].stem not in ("utils", "util", "helpers", "misc", "common")


def test_no_folder_is_called_utils():
    folders = {folder.name for folder in (ROOT / "pipeline").rglob("*") if folder.is_dir()}
    assert not folders & {"utils", "util", "helpers", "misc", "common"}


def test_at_most_four_modules_stand_at_the_root():
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 4


def test_contracts_have_at_most_twelve_members():
    for module in NAMES:
        if module.startswith("pipeline.core.contracts"):
            for node in tree(module).body:
                if isinstance(node, ast.ClassDef):
                    kinds = (ast.FunctionDef, ast.AnnAssign, ast.Assign)
                    members = [member for member in node.body if isinstance(member, kinds)]
                    assert len(members) <= 12, f"{node.name} has {len(members)} members"


@each_module
def test_classes_are_asked_for_in_their_own_folder_only(module):
    """Elsewhere a protocol is asked for, so that a class of somebody else's can have it."""
    kinds = (*SIBLINGS, "prepare.importers")
    folders = tuple(
        f"pipeline.{kind}." for kind in kinds if not module.startswith(f"pipeline.{kind}")
    )
    concrete = {
        name.asname or name.name
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(folders)
        for name in node.names
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and called(node) == "isinstance":
            asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            assert not asked & concrete, f"{NAMES[module]}:{node.lineno}: {asked & concrete}"


def is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and "runtime_checkable" in map(
        ast.unparse, node.decorator_list
    )


def test_a_capability_is_asked_for_in_one_place():
    """Where several callers need the answer, a function beside the protocol asks for all of them."""
    asked = {
        node.name: []
        for module in NAMES
        if module.startswith("pipeline.core")
        for node in tree(module).body
        if is_protocol(node)
    }
    assert {"Packs", "CachedHead"} <= set(asked)
    for module, file in NAMES.items():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and called(node) == "isinstance":
                kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                for name in kinds & set(asked):
                    asked[name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not {name: places for name, places in asked.items() if len(places) > 1}


def with_whole_strings(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """Yield tokens, an f-string as one. Python 3.12 and later give its parts."""
    depth = 0
    for token in tokens:
        name = tokenize.tok_name[token.type]
        ends = name in ("FSTRING_END", "TSTRING_END")
        depth -= ends
        if not depth and not ends:
            yield token
        depth += name in ("FSTRING_START", "TSTRING_START")


def tokens_by_line(file: Path) -> Counter[int]:
    """How many tokens a line of code has. Docstrings and comments are no code."""
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    text = file.read_text()
    documentation = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return Counter(
        token.start[0]
        for token in with_whole_strings(tokenize.generate_tokens(io.StringIO(text).readline))
        if token.type not in layout and token.start[0] not in documentation
    )


def test_a_line_of_code_has_nine_tokens_at_most_on_average():
    """As in well-kept libraries of this field: 6 (torchtitan) to 9 (big_vision). There, one line in
    a hundred has 30 tokens or more.
    """
    counts = [count for file in FILES for count in tokens_by_line(file).values()]
    assert sum(counts) / len(counts) <= 9
    assert sum(count >= 30 for count in counts) / len(counts) <= 0.01


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone of the repository")
def test_the_top_level_has_what_belongs_there_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == {
        "pyproject.toml",
        "pipeline",
        "jobs",
        "cluster",
        "tests",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "requirements.lock",
    }
