"""Plugins: components of somebody else's, one of each kind, in a job, the schema, the report and
the contract suite; only from a job's own list, the command line, or installed packages.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.checkpoints import bundle
from pipeline.config import plugins, provenance, registry, yaml_loader
from pipeline.config.schema import JobError
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.io.ray_environment import prepare_ray
from pipeline.train import launch
from pipeline.transfer import grid, tracking

SPECTRA = Path(__file__).parent / "plugin" / "spectra"
COMPONENTS = {
    "modality": ("modality.py", ["spectrum"]),
    "model": ("backbone.py", ["spectra"]),
    "objective": ("objective.py", ["brightness"]),
    "technique": ("technique.py", ["last_layers"]),
    "baseline": ("baseline.py", ["brightest_band"]),
    "metric": ("metric.py", ["brightness_error", "gmean"]),
    "score": ("score.py", ["separation"]),
    "tracker": ("tracker.py", ["notebook"]),
    "importer": ("importer.py", ["spectra"]),
    "cohort": ("cohort.py", ["busy"]),
    "export": ("export.py", ["arrays"]),
}
"""Each kind, the one file that adds to it, and the names that the file adds."""


@pytest.fixture(autouse=True)
def no_plugins_left():
    """A test's plugins are its own."""
    yield
    plugins.use([])


@pytest.fixture
def spectra():
    plugins.use([str(SPECTRA)])


def onetomany(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


# ---------------------------------------------------------------- one file each


def test_there_is_a_plugin_of_every_kind():
    assert COMPONENTS.keys() == registry.FOLDERS.keys()


@pytest.mark.parametrize("kind", COMPONENTS)
def test_one_file_adds_a_piece_and_nothing_else_is_touched(spectra, kind):
    file, names = COMPONENTS[kind]
    found = [one for one in registry.entries(kind).values() if not one.is_ours]
    assert [(one.name, one.file) for one in found] == [(name, SPECTRA / file) for name in names]
    for one in found:
        thing = registry.get(kind, one.name)
        assert thing.registered_name == one.name and thing.options_class is not None
        assert vars(importlib.import_module(one.module))[one.attribute] is thing
    plugins.use([])
    assert not set(names) & registry.entries(kind).keys()


def test_the_readme_says_what_to_touch(tmp_path, monkeypatch):
    """It names one place for each kind, and a file that is put there is found by its name."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    stated = re.findall(r"[Aa]n? (\w+)(?: \(kind `(\w+)`\))?\s+in\s+`pipeline/([\w/]+)`", text)
    places = {kind or name: place for name, kind, place in stated}
    assert len(stated) == len(places) and places == registry.FOLDERS
    for kind, place in places.items():
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(SPECTRA / COMPONENTS[kind][0], tmp_path / place)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    registry.forget()
    found = {kind: [*registry.entries(kind)] for kind in places}
    registry.forget()
    assert found == {kind: names for kind, (_, names) in COMPONENTS.items()}


@pytest.fixture(scope="module")
def schemas() -> tuple[dict, dict]:
    """The schema of a job without the plugin, and with it."""
    plain = json.loads(onetomany("schema").stdout)
    with_plugin = json.loads(onetomany("schema", "--plugin", SPECTRA).stdout)
    plugins.use([])
    return plain, with_plugin


def names_in(node: object) -> Iterator[str]:
    """The keys and texts of a part of a schema, and the words of its patterns."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from re.findall(r"\w+", value) if key == "pattern" else names_in(value)
    elif isinstance(node, list):
        for item in node:
            yield from names_in(item)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize("kind", [kind for kind in COMPONENTS if kind != "export"])
def test_a_plugin_is_in_the_schema(kind, schemas):
    added = set(COMPONENTS[kind][1])
    if kind in ("importer", "cohort"):  # no part of a job: they have definitions of their own
        added = {f"{kind} {name}" for name in added}
    plain, with_plugin = (set(names_in(schema)) for schema in schemas)
    assert added <= with_plugin and not added & plain


def test_importers_and_cohorts_show_up_in_prepare():
    done = onetomany("prepare", "spectra", "--list", "--plugin", SPECTRA)
    assert done.exit_code == 0 and "intensities and a class" in done.output
    assert onetomany("prepare", "spectra", "--list").exit_code == 2


# ---------------------------------------------------------------- in a job

JOB = """\
name: light
storage: {storage}
plugins: [{plugin}]
sources:
  lamps:
    data: {{uri: rows, modality: {{spectrum: {{bands: 4}}}}, split_column: split, columns: {{spectrum: spectrum, value: value}}}}
    backbone: {{spectra/perceptron: {{width: 8}}}}
    objective: brightness
    train: {{steps: 4, global_batch: 16}}
targets:
  kinds:
    data: {{uri: rows, modality: spectrum, split_column: split, columns: {{spectrum: spectrum, label: label}}}}
    objective: classification
    metric: gmean
    train: {{steps: 4, global_batch: 16}}
  sums:
    data: {{uri: rows, modality: spectrum, split_column: split, columns: {{spectrum: spectrum, value: value}}}}
    objective: brightness
    train: {{steps: 4, global_batch: 16}}
techniques: [scratch, linear_probe, {{last_layers: {{count: 2}}}}]
fanout: {{seeds: 1}}
"""


def spectra_files(folder: Path) -> Path:
    """Spectra of two classes, in three splits."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, n in (("train", 64), ("validation", 32), ("test", 32)):
        label = rng.integers(0, 2, n)
        values = rng.normal(size=(n, 4)) + 2 * label[:, None]
        lines = [
            f"{' '.join(f'{v:.4f}' for v in row)} kind{k}"
            for row, k in zip(values, label, strict=True)
        ]
        (folder / f"{split}.spectra").write_text("\n".join(lines) + "\n")
    return folder


def job_file(folder: Path, plugin: str = str(SPECTRA), text: str = JOB, more: str = "") -> Path:
    """A job whose rows need not be there."""
    (folder / "rows").mkdir(exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(text.format(storage=folder / "runs", plugin=plugin) + more)
    return file


def test_a_job_names_plugins_by_paths_relative_to_its_file(tmp_path, monkeypatch):
    file = job_file(tmp_path, os.path.relpath(SPECTRA, tmp_path))
    monkeypatch.chdir("/")
    job = yaml_loader.load(file)
    assert job.plugins == [str(SPECTRA)]
    assert job.techniques[2].name == "last_layers" and job.targets["kinds"].metric == "gmean"
    assert plugins.shipped() == [SPECTRA]
    yaml_loader.load(Path(__file__).parents[1] / "jobs" / "quickstart.yaml")
    assert plugins.shipped() == [], "another job does not know them"


def test_an_installed_module_is_named_without_a_slash(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_paths", {})  # other tests name it by its path
    monkeypatch.syspath_prepend(str(SPECTRA.parent))
    assert yaml_loader.load(job_file(tmp_path, "spectra")).plugins == ["spectra"]
    assert plugins.shipped() == []


def test_without_the_plugin_its_names_are_unknown(tmp_path):
    text = JOB.replace("plugins: [{plugin}]\n", "")
    with pytest.raises(JobError) as caught:
        yaml_loader.load(job_file(tmp_path, text=text))
    said = str(caught.value)
    for unknown in (
        "unknown modality 'spectrum'",
        "unknown backbone 'spectra/perceptron'",
        "unknown objective 'brightness'",
        "unknown metric 'gmean'",
        "unknown technique 'last_layers'",
    ):
        assert unknown in said


def test_options_and_names_of_plugins_are_checked_with_their_lines(tmp_path):
    text = JOB.replace("bands: 4", "bandz: 4").replace("metric: gmean", "metric: gmeen")
    with pytest.raises(JobError) as caught:
        yaml_loader.load(job_file(tmp_path, text=text))
    said = str(caught.value)
    assert "job.yaml:6: sources.lamps.data.modality.spectrum.bandz: unknown option" in said
    assert "did you mean bands?" in said and "did you mean gmean?" in said


def module(folder: Path, text: str, name: str) -> str:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return f"./{name}.py"


WRONG = {
    "no_such_file": (None, "neither a .py file nor a folder with __init__.py"),
    "takes_a_name_of_ours": (
        'from x import register\n@register("technique", "full")\nclass A:\n    pass\n',
        "takes_a_name_of_ours.py:2: technique 'full' is already declared in "
        "pipeline.techniques.full",
    ),
    "registers_nothing": ("class A:\n    pass\n", "nothing is registered in"),
    "another_kind": (
        '@register("tecnique", "x")\nclass A:\n    pass\n',
        "unknown kind 'tecnique'; did you mean technique?",
    ),
    "no_literals": (
        'NAME = "x"\n@register("technique", NAME)\nclass A:\n    pass\n',
        "write the kind and the name out",
    ),
    "other_options": (
        "class A(Options):\n    x: Path = Field(None)\n@register('technique', 'x', "
        "options=A)\nclass B:\n    pass\n",
        "builtin types, Literal and Field only",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_plugin_stands_at_its_line(tmp_path, name):
    text, message = WRONG[name]
    named = f"./{name}.py" if text is None else module(tmp_path, text, name)
    with pytest.raises(JobError) as caught:
        yaml_loader.load(job_file(tmp_path, f"{SPECTRA}, {named}"))
    assert len(caught.value.problems) == 1, "its neighbour is used all the same"
    assert "job.yaml:3: plugins.1: " in str(caught.value) and message in str(caught.value)


def test_a_plugin_hides_no_installed_module_and_is_hidden_by_none(tmp_path):
    named = module(tmp_path, '@register("technique", "x")\nclass A:\n    pass\n', "yaml")
    with pytest.raises(ValueError, match=r"there is another module named yaml .*a name of its own"):
        plugins.use([named], tmp_path)
    with pytest.raises(ValueError, match=r"no such module is installed here; .* such as ./nowhere"):
        plugins.use(["nowhere"])
    with pytest.raises(ValueError, match="spectra is listed twice"):
        plugins.use([str(SPECTRA), str(SPECTRA)])


def test_two_plugins_with_one_name_are_refused_with_both_places(tmp_path):
    text = '\n@register("technique", "twice")\nclass A:\n    pass\n'
    one, other = (module(tmp_path, text, name) for name in ("first_of_two", "second_of_two"))
    plugins.use([one, other], tmp_path)
    with pytest.raises(ValueError) as caught:
        registry.names("technique")
    assert f"{tmp_path}/second_of_two.py:2: technique 'twice'" in str(caught.value)
    assert f"already declared in {tmp_path}/first_of_two.py:2" in str(caught.value)


def test_a_plugin_is_not_imported_while_a_job_is_checked(tmp_path):
    file = job_file(tmp_path)
    program = (
        "import sys\nfrom pipeline.config import yaml_loader\n"
        f"yaml_loader.load({str(file)!r})\n"
        "print([name for name in sys.modules if name.startswith('spectra')], 'torch' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stderr


# ---------------------------------------------------------------- installed packages


def test_an_installed_package_has_an_entry_point(tmp_path, monkeypatch):
    """As pip would install it: the package's folder, and its metadata beside."""
    (tmp_path / "installed_pieces.py").write_text(
        'from pipeline.config.registry import register\n@register("score", "always_one")\n'
        "def always_one(features, labels):\n    return 1.0\n"
    )
    info = tmp_path / "installed_pieces-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-pieces\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[onetomany]\nones = installed_pieces\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed_plugins.cache_clear()
    try:
        assert [one.named_by for one in plugins.active()] == [
            "entry point ones of installed-pieces 1.5"
        ]
        assert registry.get("score", "always_one")(None, None) == 1.0
        assert '"always_one"' in onetomany("schema").stdout
    finally:
        monkeypatch.undo()
        plugins.installed_plugins.cache_clear()


# ---------------------------------------------------------------- code, never data


def test_a_variable_of_the_shell_cannot_name_a_plugin(monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, "spectra")
    monkeypatch.syspath_prepend(str(SPECTRA.parent))
    plugins.source_file.cache_clear()
    known = []
    monkeypatch.setattr(cli, "app", lambda: known.extend(registry.entries("technique")))
    monkeypatch.setattr(cli.signals, "install", lambda: None)
    cli.main()
    assert "full" in known and "last_layers" not in known


def test_a_bundle_cannot_name_a_plugin(tmp_path, spectra):
    arch = Architecture("spectra/perceptron", {}, {"features": "spectrum", "bands": 4})
    head = ObjectiveSpec("brightness", {}, {"mean": 0.0, "std": 1.0})
    modality = ModalitySpec("spectrum", {"bands": 4}, {"mean": [0.0] * 4, "std": [1.0] * 4})
    uri = str(tmp_path / "bundle")
    bundle.save(uri, bundle.build_task(arch, head, seed=0), modality)
    table = pa.table({"spectrum": [[1.0, 2.0, 3.0, 4.0], [0.0] * 4, None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = pipeline.embed(uri, str(tmp_path / "rows.parquet"), plugins=[str(SPECTRA)])
    assert found.shape == (3, 16) and np.isnan(found).all(1).tolist() == [False, False, True]
    task = pipeline.load_bundle(uri, plugins=[str(SPECTRA)]).task()
    assert task.objective.registered_name == "brightness"
    with pytest.raises(ValueError, match="unknown model 'spectra'"):
        pipeline.embed(uri, str(tmp_path / "rows.parquet"))
    assert onetomany("export", uri, tmp_path / "copy", "--kind", "state-dict").exit_code == 2
    with pytest.raises(ValueError, match="--kind arrays"):
        pipeline.export(uri, str(tmp_path / "weights.npz"), kind="arrays")


def test_an_export_of_a_plugin_writes_a_bundle(tmp_path, spectra):
    arch = Architecture("spectra/perceptron", {}, {"features": "spectrum", "bands": 4})
    head = ObjectiveSpec("brightness", {}, {"mean": 0.0, "std": 1.0})
    uri, output = str(tmp_path / "bundle"), tmp_path / "weights.npz"
    task = bundle.build_task(arch, head, seed=0)
    bundle.save(uri, task, ModalitySpec("spectrum", {"bands": 4}, {}))
    words = ["export", uri, output, "--kind", "arrays"]
    refused = onetomany(*words)
    assert refused.exit_code == 2 and "--kind arrays" in refused.output
    done = onetomany(*words, "--plugin", SPECTRA)
    wanted = {name: tensor.numpy() for name, tensor in task.state_dict().items()}
    assert done.exit_code == 0, done.output
    assert f"{len(wanted)} arrays" in done.output
    with np.load(output) as found:
        assert found.keys() == wanted.keys()
        assert all((found[name] == value).all() for name, value in wanted.items())


def test_a_tracker_of_a_plugin_is_named_in_a_job(tmp_path):
    file = job_file(tmp_path, more=f"tracking: {{notebook: {{file: {tmp_path}/runs.jsonl}}}}\n")
    made = tracking.tracker_of(yaml_loader.load(file))
    assert made.registered_name == "notebook" and made.options.file == f"{tmp_path}/runs.jsonl"


# ---------------------------------------------------------------- what a result records


def test_a_trials_code_holds_its_plugins(tmp_path, spectra):
    job = yaml_loader.load(job_file(tmp_path))
    arch = Architecture("spectra/perceptron", {}, {})
    made = grid.backbone_groups({"lamps": (arch, ModalitySpec("spectrum", {}, {}))})
    code = grid.made_by(job.targets["kinds"], made[0], job.techniques[2]).code
    assert {
        "modality spectrum",
        "model spectra",
        "technique last_layers",
        "metric gmean",
        "metric brightness_error",
        "objective classification",
    } <= code.keys()
    assert not [part for part in code if part.startswith("spectra.")], "each component by itself"
    cart = SPECTRA.with_name("cart_world.py")
    plugins.use([str(SPECTRA), str(cart)])
    code = grid.made_by(job.targets["kinds"], made[0], job.techniques[2]).code
    assert "cart_world" in code, "policies act in its environment"
    plugins.use([])
    bare = provenance.components_of("image", "timm/resnet18", {}, "classification", "full")
    assert not [name for kind, name in bare if kind == "metric"]


# ---------------------------------------------------------------- elsewhere


def test_submit_ships_the_plugins_of_a_job(tmp_path):
    shutil.copytree(
        SPECTRA, tmp_path / "more" / "spectra_shipped", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "rows" / "part.parquet")
    file = job_file(tmp_path, "more/spectra_shipped")
    done = onetomany("submit", file, "--dry-run")
    assert done.exit_code == 0, done.output
    for name in ("__init__", *(Path(file).stem for file, _ in COMPONENTS.values())):
        assert f"  more/spectra_shipped/{name}.py" in done.output


@pytest.mark.slow
def test_the_contract_suite_runs_over_a_plugins_pieces():
    """In a process that knows the plugin as a Ray worker does; its rows stand beside it."""
    root, tests = SPECTRA.parents[2], SPECTRA.parents[1]
    environment = {
        **os.environ,
        plugins.VARIABLE: "spectra",
        "PYTHONPATH": os.pathsep.join(map(str, (root, tests, SPECTRA.parent))),
    }
    words = ["-m", "pytest", "-n0", "-p", "no:cacheprovider", "-p", "spectra_rows", "-rs"]
    words += ["tests/test_contracts.py", "-k", "spectr or brightness or last_layers or have_rows"]
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


@pytest.fixture
def ray_with_spectra(spectra):
    """A Ray whose workers know the plugin, as `launch.start` begins one for a job."""
    import ray

    ray.shutdown()  # the one that other tests share does not know it
    prepare_ray()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        job_config=launch.ImportThisPackage(),
        runtime_env=launch.plugins_env(),
    )
    yield
    ray.shutdown()


def test_workers_of_a_ray_that_runs_already_must_know_the_plugins(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    launch.start(None, False)
    plugins.use([str(SPECTRA)])
    with pytest.raises(launch.ClusterError, match="its workers do not know the plugins spectra"):
        launch.start(None, False)


@pytest.mark.slow
@pytest.mark.ray(own=True)
@pytest.mark.timeout(600)
def test_a_job_of_plugins_runs_from_files_to_predictions(tmp_path, ray_with_spectra):
    """Prepare, pretrain, score, fine-tune, report and predict, in Ray's workers."""
    raw = spectra_files(tmp_path / "raw")
    done = onetomany("prepare", "spectra", raw, "-o", tmp_path / "rows", "--plugin", SPECTRA)
    assert done.exit_code == 0, done.output
    start, end = JOB.index("  sums:"), JOB.index("techniques:")
    select = "fanout: {{seeds: 1, select: {{score: separation, top: 1}}}}"
    text = (JOB[:start] + JOB[end:]).replace("fanout: {{seeds: 1}}", select)
    notebook = tmp_path / "notebook.jsonl"
    more = f"tracking: {{notebook: {{file: {notebook}}}}}\n"
    file = job_file(tmp_path, text=text, more=more)
    done = onetomany("run", file)
    assert done.exit_code == 0, done.output
    job = pipeline.load_job(file)
    rows = pipeline.results(job).to_pylist()
    primary = [row for row in rows if row["split"] == "test" and row["metric"] == "gmean"]
    assert {row["technique"] for row in primary} == {"scratch", "linear_probe", "last_layers"}
    assert {row["score_name"] for row in primary if row["source"] != "none"} == {"separation"}
    report = Path(job.root, "report.md").read_text()
    assert "last_layers" in report and "gmean" in report and "Separation" in report
    logged = [json.loads(line) for line in notebook.read_text().splitlines()]
    begun = [line["name"] for line in logged if "name" in line]
    assert begun[:2] == ["light", "lamps"] and len(set(begun)) == len(begun) == 2 + 3
    assert {"run": "job", "file": "report.html"} in logged
    scored = onetomany("score", file)
    assert scored.exit_code == 0 and "Separation" in scored.output and "LogME" in scored.output
    best = next(row["bundle_uri"] for row in rows if row["bundle_uri"])
    words = ["predict", best, tmp_path / "rows", "-o", tmp_path / "out"]
    refused = onetomany(*words)
    assert refused.exit_code == 2 and "unknown" in refused.output
    done = onetomany(*words, "--plugin", SPECTRA)
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "out" / "part-00000.parquet")["prediction"].null_count == 0
