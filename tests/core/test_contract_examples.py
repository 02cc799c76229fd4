"""The examples in the contracts are complete: as files of a plugin they do what they say."""

import ast
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import image_files, job_of, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import plugins, registry
from pipeline.core import contracts
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture
from pipeline.transfer import trial

COLUMNS = {"signal": "x"}


def example(page: str) -> str:
    """The code block of a contract's docstring."""
    file = Path(contracts.__file__).with_name(f"{page}.py")
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text is not None
    lines = text.split("::\n", 1)[1].splitlines()
    code = [line for line in lines if not line.strip() or line.startswith("    ")]
    return textwrap.dedent("\n".join(code)).replace("'''", '"""')


@pytest.fixture(scope="module", autouse=True)
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin") / "contract_examples"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for page in ("modality", "backbone", "technique"):
        (folder / f"{page}.py").write_text(example(page))
    plugins.use([str(folder)])
    yield
    plugins.use([])


def test_rows_of_the_example_go_through_its_backbone():
    rows = np.random.default_rng(0).normal(3, 2, (6, 5)).tolist()
    table = pa.table({"x": [*rows, [1.0], None]})
    kind = registry.get("modality", "sensor")
    options = kind.options_class(length=5)
    modality = kind(options, kind.fit(options, table.slice(0, 6), COLUMNS, "sensor/mlp"))
    arrays, errors = modality.decode(table, COLUMNS)
    assert [bool(error) for error in errors] == [False] * 6 + [True] * 2
    good = {name: array[:6] for name, array in arrays.items()}
    batch = modality.finish(Batch(np.arange(6), torch.arange(6), modality.collate(good)))
    assert abs(float(batch["signal"].mean())) < 1e-5
    assert float(batch["signal"].std(correction=0)) == pytest.approx(1, abs=1e-5)
    arch = Architecture("sensor/mlp", {"width": 4}, modality.inputs())
    backbone = bundle.build_backbone(arch, seed=0)
    assert backbone(batch).pooled.shape == (6, 4)
    named = [name for names in backbone.layers().values() for name in names]
    assert sorted(named) == sorted(name for name, _ in backbone.named_parameters())
    assert registry.architectures("sensor") == {"mlp"}


def test_a_penalty_of_the_examples_holds_the_weights(tmp_path):
    paths = image_files(tmp_path, {"train": 16, "validation": 8, "test": 8})
    job = job_of(tmp_path, paths, train={"steps": 4, "lr": 0.05, "keep": "last"})
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)

    def distance(name):
        record = trial.run(trial_of(job, shared, name), shared)
        weights = bundle.load(record.rows[0].bundle_uri).tensors
        start = shared.weights["src"]
        return sum(
            float((weights[f"backbone.{name}"] - torch.from_numpy(array)).square().sum())
            for name, array in start.items()
        )

    assert 0 < distance("near_start") < distance("full")
