"""The public functions: light to import, typed, and the same work as the command line's."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_runs import saved_vit, trials_in_this_process, without_ray
from toys import image_files

import pipeline
from pipeline import api

FUNCTIONS = (
    "load_job",
    "run",
    "pretrain",
    "finetune",
    "score",
    "predict",
    "embed",
    "export",
    "push",
    "prepare_data",
    "embed_files",
    "load_bundle",
    "results",
    "advise",
)
QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_typed_and_described(name):
    function = getattr(pipeline, name)
    assert function is getattr(api, name) and name in dir(pipeline)
    assert len(inspect.getdoc(function).splitlines()[0]) > 20
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_the_package_says_that_it_is_typed():
    assert Path(pipeline.__file__).with_name("py.typed").is_file()
    assert typing.TYPE_CHECKING is False, "names for type checkers are not imported"


def test_importing_the_package_and_checking_a_job_is_light():
    heavy = {"torch", "ray", "timm", "transformers", "numpy", "pyarrow"}
    program = (
        "import sys\nimport pipeline\n"
        "print([name for name in sys.modules if name.startswith('pipeline')])\n"
        f"pipeline.load_job({str(QUICKSTART)!r})\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['pipeline']", "[]"], done.stderr


def test_what_is_no_function_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'runn'"):
        pipeline.runn  # noqa: B018


def test_fields_are_set_by_a_mapping_or_by_texts():
    by_name = pipeline.load_job(QUICKSTART, {"fanout.seeds": 1, "techniques": ["scratch"]})
    by_text = pipeline.load_job(QUICKSTART, ["fanout.seeds=1", "techniques=[scratch]"])
    assert by_name == by_text and by_name.fanout.seeds == 1
    with pytest.raises(ValueError, match=r"fanout\.seed: unknown field; did you mean seeds"):
        pipeline.load_job(QUICKSTART, {"fanout.seed": 1})


JOB = """\
name: toy
storage: {folder}/runs
sources: {{a: {{backbone: "{bundle}"}}}}
targets:
  task:
    data: {{{paths}, modality: image, columns: {{image: picture, label: class}}}}
    objective: classification
    train: {{steps: 3, global_batch: 12, lr: 0.01, eval_every_steps: 3}}
techniques: [scratch, linear_probe]
fanout: {{seeds: 1}}
"""


def test_a_job_runs_in_a_program(tmp_path, monkeypatch):
    """Trials and sources in this process; what comes back is what the report shows."""
    paths = image_files(tmp_path, {"train": 24, "validation": 12, "test": 12}, size=32)
    named = ", ".join(f"{split}: {path}" for split, path in paths.items())
    uri = saved_vit(tmp_path / "vit")
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(folder=tmp_path, bundle=uri, paths=named))
    without_ray(monkeypatch)
    ran = trials_in_this_process(monkeypatch)
    job = pipeline.load_job(file)
    outcome = pipeline.run(job)
    assert len(ran) == 2 and not outcome.failed and outcome.bundles.keys() == {"a"}
    assert {entry.technique for entry in outcome.entries} == {"scratch", "linear_probe"}
    assert Path(outcome.report).is_file() and Path(outcome.results).is_file()
    table = pipeline.results(job)
    assert isinstance(table, pa.Table) and table.num_rows >= len(outcome.rows) > 0
    assert pipeline.results(job.root).equals(table)
    assert pipeline.run(job).entries and len(ran) == 2, "nothing is left to run"
    index = (Path(job.root) / "trials.csv").read_text()
    assert "task/a/linear_probe/1.0/seed0,done,True,accuracy," in index
    names = {row["trial_name"] for row in table.to_pylist()}
    assert len(names) == 2 and "task/a/linear_probe/1.0/seed0" in names
    best = next(row["bundle_uri"] for row in table.to_pylist() if row["bundle_uri"])
    task = pipeline.load_bundle(best).task()
    rows = pq.read_table(paths["test"]).select(["picture"])
    pq.write_table(rows, tmp_path / "new.parquet")
    found = pipeline.embed(best, str(tmp_path / "new.parquet"))
    assert found.shape == (12, task.backbone.pooled_dim) and np.isfinite(found).all()
    again = pipeline.embed(best, str(tmp_path / "new.parquet"), columns={"image": "picture"})
    assert np.array_equal(found, again)
    places = [Path(best), tmp_path / "new.parquet"]
    assert np.array_equal(pipeline.embed(places[0], places[1]), found)
    root = Path(job.root)
    assert pipeline.results(root).equals(table)
    wanted = pipeline.best_bundle(root)
    expected = pipeline.load_bundle(wanted)
    for place in (root, root / "results.parquet"):
        assert pipeline.best_bundle(place) == wanted
        copy = tmp_path / "copy" / place.name
        pipeline.export(place, copy)
        assert pipeline.load_bundle(copy).manifest.spec_hash == expected.manifest.spec_hash
