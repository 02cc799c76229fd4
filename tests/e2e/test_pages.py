"""What the pages say can be done: every command parses, every job loads, every link leads somewhere,
the examples and the notebooks run.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer.main
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.config import plugins, registry, yaml_loader
from tests.e2e.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "jobs").rglob("*.md")),
    ROOT / "cluster/README.md",
    ROOT / "tests/README.md",
]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "jobs").rglob("*.ipynb"))
PLACEHOLDERS = {"JOB", "job.yaml", "reviews.yaml", "stays.yaml"}
"""Job files that a page names and that are the reader's own."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words after ``onetomany`` of every command of a page, in blocks and in sentences."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.DOTALL | re.M))
    in_blocks = re.findall(
        r"^    (?:.*&& )?(?:\w+=\S+ )*(?:uv run (?:--\S+ )*)?onetomany (.*)$", text, re.M
    )
    in_sentences = re.findall(r"`onetomany ([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.M))
    for line in [*in_blocks, *in_sentences]:
        yield shlex.split(line, comments=True)


def header(job: Path) -> str:
    """The commands at the top of a job file, as a page has them."""
    comments = re.match(r"(?:#.*\n)*", job.read_text())
    assert comments
    return re.sub(r"^# ?", "    ", comments[0], flags=re.MULTILINE)


@cache
def subcommands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(cli.app).commands


def parse(words: list[str]) -> dict[str, object]:
    """The arguments of a command; nothing is run. Raises where the command would refuse them."""
    verb, *rest = words
    return subcommands()[verb].make_context(verb, rest).params


@pytest.fixture
def variables(monkeypatch):
    """The variables of the shipped jobs' own folders; nothing is looked for there."""
    for job in JOBS:
        for variable in re.findall(r"\$\{(\w+)\}", job.read_text()):
            monkeypatch.setenv(variable, f"s3://bucket/{variable.lower()}")


@pytest.mark.parametrize("page", [*PAGES, *JOBS], ids=name)
def test_every_command_parses_and_its_job_loads(page, variables):
    found = list(commands(page.read_text() if page.suffix == ".md" else header(page)))
    assert found or page.suffix == ".md", "a job opens with its command"
    if page.suffix == ".yaml":
        assert len(found) == len(re.findall(r"\bonetomany [a-z]+ ", header(page))), "all are seen"
    for words in found:
        if words[0].startswith("-"):
            continue
        if len(words) == 1:  # the name of a command in a sentence
            assert words[0] in subcommands()
            continue
        given = parse(words)
        job = given.get("job")
        if job is None or str(job) in PLACEHOLDERS:
            continue
        yaml_loader.load(ROOT / str(job), given.get("set_") or [], True)


def test_the_check_of_commands_sees_a_mistake():
    text = "Say `onetomany run\nJOB --drry-run`.\n\n    A=1 onetomany predit x \\\n        y -o z\n"
    assert list(commands(text)) == [["predit", "x", "y", "-o", "z"], ["run", "JOB", "--drry-run"]]
    with pytest.raises(Exception, match="--drry-run"):
        parse(["run", "JOB", "--drry-run"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = target.partition("#")
        if place.startswith("http"):
            continue
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}
            assert anchor in slugs, f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_whole_job_on_a_page_loads(page, tmp_path, variables):
    for number, text in enumerate(blocks(page.read_text(), "yaml")):
        if re.search(r"^targets:", text, re.MULTILINE):
            (tmp_path / f"{number}.yaml").write_text(text)
            for file in re.findall(r"uri: ([\w.]+)", text):
                (tmp_path / file).touch()  # that a file is there is checked
            assert yaml_loader.load(tmp_path / f"{number}.yaml", [], True).targets


def test_the_readme_is_short_and_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert re.findall(r"^    pip .*$", text, re.MULTILINE)[:2] == [
        "    pip install uv && uv run --no-dev onetomany run jobs/quickstart.yaml",
        "    pip install uv && uv run pytest",
    ]


# ---------------------------------------------------------------- lists that must be whole


def described(section: str) -> dict[str, str]:
    """The entries of the lists of a section of the page of concepts."""
    text = (ROOT / "jobs/concepts.md").read_text()
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^- `(\w+)`: (.*?)(?=\n(?:- |\n|$))", text, re.DOTALL | re.MULTILINE)
    return {component: " ".join(words.split()) for component, words in found}


def test_every_technique_is_described_in_two_sentences():
    found = described("Techniques")
    assert sorted(found) == registry.names("technique")
    for technique, words in found.items():
        assert words.endswith("."), technique
        assert len(re.split(r"(?<=[.!])\s+(?=[A-Z])", words)) == 2, f"{technique}: {words}"


def test_every_baseline_is_described():
    assert sorted(described("Baselines")) == registry.names("baseline")


def test_the_page_of_the_api_has_every_function_with_its_first_line():
    text = (ROOT / "jobs/python_api.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    functions = {one for one in pipeline.__all__ if inspect.isfunction(getattr(pipeline, one))}
    assert rows == {
        one: (inspect.getdoc(getattr(pipeline, one)) or "").splitlines()[0] for one in functions
    }


# ---------------------------------------------------------------- examples that run


def test_the_plugin_on_the_page_is_one_of_the_tests_and_works(tmp_path, monkeypatch):
    page = (ROOT / "jobs/plugins.md").read_text()
    (source,) = blocks(page, "python")
    assert source == (ROOT / "tests/plugin/spectra/technique.py").read_text()
    (tmp_path / "last_layers.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    (words,) = [words for words in commands(page) if words[:2] == ["techniques", "last_layers"]][:1]
    try:
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0 and "count: 1" in done.output
    finally:
        plugins.use([])


def shorten(job: Path) -> None:
    """Leave a few steps and one seed: what runs is looked at, not what is learned."""
    text = re.sub(r"\b(?:steps|epochs): \d+", "steps: 2", job.read_text())
    job.write_text(text.replace("fanout: {seeds: 3}", "fanout: {seeds: 1}"))


@pytest.fixture
def beside_jobs(tmp_path, monkeypatch):
    """An empty folder with ``jobs`` in it, where everything runs in this process."""
    from stage_runs import without_ray

    ignored = shutil.ignore_patterns("data", "*_small.yaml", "*.png", "runs", "records")
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=ignored)
    (tmp_path / "jobs/data").symlink_to(ROOT / "jobs/data")
    for job in tmp_path.glob("jobs/*/first_steps.yaml"):
        shorten(job)
    monkeypatch.chdir(tmp_path)
    without_ray(monkeypatch)
    return tmp_path


@pytest.mark.slow
def test_the_example_of_the_api_runs(beside_jobs):
    (source,) = blocks((ROOT / "jobs/python_api.md").read_text(), "python")
    (beside_jobs / "new.csv").write_text("text\nthe soup was cold\ngreat food\n")
    space: dict[str, object] = {}
    exec(compile(source, "python_api.md", "exec"), space)
    assert not space["outcome"].failed and len(space["features"]) == 2
    assert pq.read_table(beside_jobs / "predictions")["prediction"].null_count == 0


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_has_no_outputs_and_no_paths_of_a_machine(notebook):
    found = json.loads(notebook.read_text())
    assert found["nbformat"] == 4 and found["cells"][0]["cell_type"] == "markdown"
    for cell in found["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\", "".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_runs(notebook, beside_jobs, monkeypatch):
    """Its code cells, one after the other, in the folder in which Jupyter would run them."""
    monkeypatch.chdir(beside_jobs / notebook.parent.relative_to(ROOT))
    space: dict[str, object] = {}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    assert not space["outcome"].failed and len(space["tested"])
    assert pq.read_table("predictions").num_rows
