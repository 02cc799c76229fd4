"""What made a result: a hash of normalised source, found part by part, and the versions of
libraries.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import plugins, provenance, registry
from pipeline.config.provenance import (
    Provenance,
    changes,
    code_of,
    differences,
    from_metadata,
    source_hash,
)
from pipeline.simulation import environment

SAMPLE = '''"""A sample that has what versions of Python parse or dump differently."""
import os.path
from dataclasses import dataclass, field as f


@dataclass(frozen=True)
class Point:
    """Two numbers."""

    x: float = 0.0
    """Metres."""
    names: list[str] = f(default_factory=list)


async def told(self, /, a, *rest, b: int = 1 << 30, **more):
    text = f"{a!r:>{b}} {'in ' f'{more}'} 100% {rest[0]=}" " and more" f"{{}}"
    match rest:
        case [1, *others] | {"a": others}:
            return {**more, "a": 1e-4, None: b"\\x00é".decode() if others else ...}
        case None:
            pass
    try:
        return [lambda *, k=None: (yield), *(i for i in rest if not i), -1j, text, os.path]
    except (ValueError, OSError) as error:
        raise RuntimeError from error
'''.replace("é", "")


def test_the_hash_of_a_stored_sample_is_the_same_on_every_python():
    """Python 3.11, 3.12 and 3.13 gave this one; `ast.dump` differs between them."""
    assert source_hash(SAMPLE) == "c0b0fded5dbc"


@pytest.mark.parametrize(
    "other",
    [
        "def f(a, b):\n    # why\n    return g('x', a + b)  # what\n",
        'def f(a, b):\n    """What it does."""\n    return g("x", a + b)\n',
        'def f(\n    a,\n    b,\n):\n    return g(\n        "x",\n        (a + b),\n    )\n',
        'def f(a, b):\n    return g("" "x", a \\\n + b)\n',
        'def f(a, b): return g("x", a + b)\n',
        '"""A module."""\n\n\ndef f(a, b):\n    return g("x", a + b)\n\n\n',
    ],
    ids=["comments", "docstring", "lines", "pieces", "one line", "module"],
)
def test_comments_docstrings_and_formatting_do_not_count(other):
    assert source_hash(other) == source_hash('def f(a, b):\n    return g("x", a + b)\n')


@pytest.mark.parametrize(
    "other",
    [
        'def f(a, b):\n    return g("x", a - b)\n',
        'def f(a, b):\n    return g("y", a + b)\n',
        'def f(a, b=1):\n    return g("x", a + b)\n',
        'def f(b, a):\n    return g("x", a + b)\n',
        'def f(a, b):\n    return h("x", a + b)\n',
        'def f(a, b):\n    g("x", a + b)\n',
        'def f(a, b):\n    return g(b"x", a + b)\n',
        'def f(a, b):\n    return g("x", a + b)\n\n\nC = 1\n',
    ],
)
def test_everything_else_counts(other):
    assert source_hash(other) != source_hash('def f(a, b):\n    return g("x", a + b)\n')


def test_the_order_of_imports_does_not_count_and_what_is_imported_does():
    one = "import os\nimport sys\nfrom math import exp, log\n"
    assert source_hash(one) == source_hash(
        "from math import (\n    log,\n    exp,\n)\nimport sys, os\n"
    )
    assert source_hash(one) != source_hash(one.replace("math import exp", "numpy import exp"))
    assert source_hash("x = {**a, 'k': b}") != source_hash("x = {'k': a, **b}")


# ---------------------------------------------------------------- which code counts

PROBE = (
    ("modality", "image"),
    ("model", "timm"),
    ("objective", "classification"),
    ("technique", "linear_probe"),
)


def test_what_a_trial_uses_is_found_by_its_imports():
    code = code_of((*provenance.TRIAL_CODE, *provenance.FROZEN_CODE), PROBE)
    assert {
        "technique linear_probe",
        "objective classification",
        "modality image",
        "model timm",
    } <= code.keys()
    parts = (
        "train.loop",
        "train.optim",
        "train.evaluate",
        "data.plan",
        "data.loader",
        "data.stream",
        "core.metrics.catalog",
        "core.contracts",
        "checkpoints.bundle",
        "media.image_ops",
        "transfer.trial",
        "transfer.cached_heads",
    )
    assert {f"pipeline.{part}" for part in parts} <= code.keys()
    left_out = (
        "techniques",
        "objectives.",
        "modalities.",
        "models.",
        "io.",
        "cli",
        "report.report",
        "transfer.fanout",
        "prepare.",
    )
    assert not [
        part for part in code for name in left_out if part.startswith(f"pipeline.{name}")
    ], "of the components those that it uses, and no files"


def test_each_piece_has_code_of_its_own():
    for kind in ("modality", "model", "objective", "technique"):
        for name in registry.names(kind):
            assert f"{kind} {name}" in code_of((), ((kind, name),))
    both = [code_of((), (("technique", name),))[f"technique {name}"] for name in ("full", "lp_ft")]
    assert both[0] != both[1], "though they stand in one file"
    text = code_of(
        provenance.SOURCE_CODE,
        (
            ("modality", "text"),
            ("model", "transformers"),
            ("objective", "mlm"),
            ("technique", "full"),
        ),
    )
    assert (
        "pipeline.media.tokenization" in text
        and "pipeline.media.image_io" not in text
        and "pipeline.checkpoints.hf_text" not in text
    )
    assert "pipeline.checkpoints.hf_text" in code_of(provenance.CHECKPOINT_CODE, ())


def test_the_modules_that_are_named_are_there():
    named = {
        *provenance.MAKES_NO_NUMBERS,
        *provenance.SOURCE_CODE,
        *provenance.CHECKPOINT_CODE,
        *provenance.TRIAL_CODE,
        *provenance.FROZEN_CODE,
    }
    assert not [module for module in named if plugins.source_file(module) is None]


def test_a_backbone_that_holds_another_brings_its_library_in():
    components = provenance.components_of(
        "trajectory",
        "policy/transformer",
        {"vision": "timm/resnet18", "width": 8, "note": "a/b"},
        "behaviour_cloning",
        "full",
    )
    assert components == (
        ("modality", "trajectory"),
        ("model", "policy"),
        ("model", "timm"),
        ("objective", "behaviour_cloning"),
        ("technique", "full"),
    )


def test_the_record_of_a_policys_trial_has_the_code_of_its_environments():
    code = code_of((), [("objective", "behaviour_cloning")])
    places = environment.OWN_ENVIRONMENTS.values()
    assert {f"pipeline.simulation.{place.partition(':')[0]}" for place in places} <= code.keys()


HASHES = """
import sys
from pipeline.config import provenance
pieces = (("modality", "image"), ("model", "timm"), ("objective", "classification"), ("technique", "linear_probe"))
print(provenance.made_by((*provenance.TRIAL_CODE, *provenance.FROZEN_CODE), pieces).hash, "torch" in sys.modules)
"""


def hash_in(folder: Path) -> str:
    out = subprocess.run(
        [sys.executable, "-c", HASHES],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    found, heavy = out.stdout.split()
    assert heavy == "False", "sources are read, not imported"
    return found


@pytest.mark.slow
def test_where_the_package_lies_does_not_count_and_what_stands_in_it_does(tmp_path):
    def copied(name: str, file: str = "", old: str = "", new: str = "") -> Path:
        folder = tmp_path / name
        shutil.copytree(
            Path(registry.__file__).parents[1],
            folder / "pipeline",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        if file:
            path = folder / "pipeline" / file
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
        return folder

    here = hash_in(Path(registry.__file__).parents[2])
    assert hash_in(copied("elsewhere")) == here
    assert (
        hash_in(
            copied("comment", "train/optim.py", "\nimport torch\n", "\n# a comment\nimport torch\n")
        )
        == here
    )
    assert hash_in(copied("files", "io/storage.py", "_MIB = 2**20", "_MIB = 2**21")) == here, (
        "it moves files and makes no number"
    )
    assert (
        hash_in(
            copied(
                "neighbour",
                "techniques/linear_probe.py",
                "class RandomProbe(LinearProbe):",
                "class RandomProbe(LinearProbe):\n    more = 1\n",
            )
        )
        == here
    )
    assert (
        hash_in(
            copied(
                "technique",
                "techniques/linear_probe.py",
                "class LinearProbe(Technique):",
                "class LinearProbe(Technique):\n    more = 1\n",
            )
        )
        != here
    )
    assert hash_in(copied("loop", "core/rng.py", "\ndef mix(", "\nMORE = 1\n\n\ndef mix(")) != here


def test_a_piece_of_a_plugin_counts_with_the_plugins_own_modules(tmp_path, monkeypatch):
    package = tmp_path / "acme_pieces" / "techniques"
    package.mkdir(parents=True)
    (tmp_path / "acme_pieces" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (tmp_path / "acme_pieces" / "curves.py").write_text("def curve(x):\n    return 2 * x\n")
    (package / "shake.py").write_text(
        "import numpy\nfrom pipeline.core import rng\nfrom pipeline.core.contracts import "
        "Technique\nfrom pipeline.config.registry import register\n"
        "from ..curves import curve\n\n\n"
        "@register('technique', 'shake')\nclass Shake(Technique):\n    def rates(self, "
        "layers):\n        return curve(rng.mix(1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    declared = registry.Entry(
        "technique", "shake", "acme_pieces.techniques.shake", registry.Options
    )
    monkeypatch.setattr(registry, "entry", lambda kind, name: declared)

    def code() -> dict[str, str]:
        provenance.forget()
        return code_of((), (("technique", "shake"),))

    before = code()
    assert {
        "technique shake",
        "acme_pieces.curves",
        "pipeline.core.contracts",
        "pipeline.core.rng",
    } <= before.keys() and "numpy" not in before
    (tmp_path / "acme_pieces" / "curves.py").write_text("def curve(x):\n    return 3 * x\n")
    after = code()
    assert {part for part in before if before[part] != after[part]} == {"acme_pieces.curves"}
    (tmp_path / "acme_pieces" / "curves.py").unlink()
    assert code()["acme_pieces.curves"] == provenance.WITHOUT_SOURCE, "as one that was compiled"


# ---------------------------------------------------------------- what changed, in words

NOW = Provenance(
    {"pipeline.core.rng": "1", "technique full": "2"}, {"torch": "2.11.0", "timm": "1.0.20"}
)


def test_what_changed_is_told_part_by_part():
    assert changes(NOW, NOW) == ()
    assert changes(None, NOW) == (provenance.NOT_RECORDED,)
    then = Provenance(
        {"pipeline.core.rng": "0", "pipeline.old": "3"}, {"torch": "2.10.0", "timm": "1.0.20"}
    )
    assert changes(then, NOW) == (
        "pipeline.core.rng changed",
        "pipeline.old is no longer used",
        "technique full is used now",
        "torch 2.10.0 then, now 2.11.0",
    )


def test_two_results_are_compared_by_the_code_that_both_use():
    assert (
        differences(
            NOW, Provenance({"pipeline.core.rng": "1", "technique scratch": "9"}, NOW.versions)
        )
        == ()
    )
    assert differences(
        NOW, Provenance({"pipeline.core.rng": "4"}, {"torch": "2.11.0", "timm": "1.0.19"})
    ) == ("pipeline.core.rng differs", "timm 1.0.20 and 1.0.19")
    assert differences(None, None) == () and differences(NOW, None)


def test_what_is_recorded_is_read_back():
    record = {"rows": [], **NOW.metadata()}
    assert from_metadata(record) == NOW and record["made_by"]["hash"] == NOW.hash
    assert (
        from_metadata(
            {
                "versions": {"python": "3.11.1", "ray": "2", **NOW.versions},
                "made_by": record["made_by"],
            }
        )
        == NOW
    ), "a bundle names more versions"
    assert from_metadata({"versions": {"torch": "2.9.0"}}) is None
    assert set(provenance.versions()) == set(provenance.LIBRARIES)
