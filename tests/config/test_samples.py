"""The quickstart that is packed with the package: its copy, and what its samples weigh."""

import re
from pathlib import Path

import yaml

from pipeline.config import samples, yaml_loader
from pipeline.config.schema import DOMAINS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "jobs" / "data"


def test_the_copy_is_whole_and_what_was_changed_stays(tmp_path):
    job = samples.copy_quickstart(tmp_path / "quickstart")
    copied = {str(path.relative_to(job.parent)) for path in job.parent.rglob("*") if path.is_file()}
    assert copied == {*yaml_loader.relative_places(job), samples.LICENCES, "quickstart.yaml"}
    job.write_text(job.read_text().replace("seeds: 3", "seeds: 4"))
    sample = job.parent / yaml_loader.relative_places(job)[0]
    sample.unlink()
    assert samples.copy_quickstart(job.parent) == job
    assert yaml_loader.load(job).fanout.seeds == 4 and sample.is_file()


def test_there_is_a_target_and_a_source_of_every_domain():
    job = yaml_loader.load(samples.quickstart())
    for domain in DOMAINS:
        part = job.model_copy(update={"only": [domain]}).selected()
        assert part.sources and part.targets, domain


def test_the_samples_are_small_and_have_licences():
    page = (DATA / "README.md").read_text()
    files = {path.name for path in DATA.iterdir() if path.suffix in (".parquet", ".safetensors")}
    assert sum((DATA / name).stat().st_size for name in files) < 12e6
    licensed = [entry for entry in page.split("\n- ")[1:] if re.search(r"\n  Licence: \w", entry)]
    named = {
        name for entry in licensed for name in re.findall(r"`(\w+\.\w+)`", entry.split(":")[0])
    }
    assert files == named


def test_what_the_job_reads_is_packed():
    """The wheel holds the folder but for what no job of the quickstart reads."""
    read = set(yaml_loader.relative_places(samples.quickstart()))
    assert read == {f"data/{path.name}" for path in DATA.glob("*.parquet")}
    text = yaml.safe_load(samples.quickstart().read_text())
    assert not re.search(r"\$\{\w+\}", str(text)), "nobody has to set a variable"
