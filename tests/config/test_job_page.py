"""The page of the job file, which is made from the classes that check one."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import job_page

PAGE = Path(__file__).parents[2] / "jobs" / "job_file.md"


def test_the_page_is_what_the_command_prints():
    done = CliRunner().invoke(cli.app, ["schema", "--markdown"])
    assert done.exit_code == 0
    assert done.stdout == PAGE.read_text(), "run: onetomany schema --markdown > jobs/job_file.md"


@pytest.mark.parametrize("part", job_page.PARTS, ids=lambda part: part.__name__)
def test_every_field_has_an_item_and_the_example_is_taken(part):
    text = job_page.page()
    heading, example = job_page.PARTS[part]
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    fields = re.findall(r"^- \*\*`(\w+)`\*\* \((.+?)\):\s+\S", section, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in fields] == list(part.model_fields)
    assert all(len(line) <= 100 for line in section.splitlines())
    assert f"```yaml\n{example}```" in section
    part.model_validate(yaml.safe_load(example))


def test_the_sections_that_fields_name_are_there():
    text = job_page.page()
    headings = {line[3:].lower().replace(" ", "-") for line in re.findall(r"^## .*$", text, re.M)}
    named = set(re.findall(r"\]\(#([a-z-]+)\)", text))
    assert named and named <= headings


def test_types_bounds_and_defaults_are_in_words():
    items = re.sub(r"\n  (?=\S)", " ", job_page.page())
    fields = dict(re.findall(r"^- \*\*`(\w+)`\*\* (.*)$", items, re.MULTILINE))
    assert fields["clip_norm"].startswith("(number, above 0; default `1.0`): largest")
    assert fields["schedule"].startswith("(`cosine`, `constant`; default `cosine`): ")
    assert fields["plugins"].startswith("(list of texts): modules")
    assert fields["backbone"].startswith("(component, see `onetomany backbones`; required): ")
    assert fields["metric"].startswith("(name, see `onetomany metrics`): ")
    assert fields["sources"].startswith("(list of texts): "), "those of a target come last"
