"""The table of ways in and out (in_and_out.md) is complete, and its tests exist."""

import ast
import re
from pathlib import Path

import pytest

from pipeline.config import registry

TESTS = Path(__file__).parent
PAGE = (TESTS / "in_and_out.md").read_text()


@pytest.mark.parametrize(
    ("kind", "shown_as"),
    [
        ("importer", "`prepare {}`"),
        ("export", "`export --kind {}`"),
        ("tracker", "`tracking: {}`"),
    ],
)
def test_every_name_has_a_row(kind, shown_as):
    missing = [name for name in registry.names(kind) if shown_as.format(name) not in PAGE]
    assert not missing, f"rows of in_and_out.md are missing for {missing}"


def test_every_library_of_backbones_has_a_row():
    others = PAGE.partition("## Networks in")[2].partition("## Networks out")[0]
    ways = set(re.findall(r"`(\w+)[/:]", others))
    assert set(registry.names("model")) <= ways


def test_every_test_that_is_named_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    tables = PAGE.count("| what | how |")
    assert len(named) == len(rows) - tables, "a row without a test"
    for file, function in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((TESTS / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert function in functions, f"{file} has no {function}"
