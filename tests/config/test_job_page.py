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
def test_every_field_has_a_row_and_the_example_is_taken(part):
    text = job_page.page()
    heading, example = job_page.PARTS[part]
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in part.model_fields]
    assert all(cell.strip() for row in rows for cell in row) and {len(row) for row in rows} == {4}
    assert f"```yaml\n{example}```" in section
    part.model_validate(yaml.safe_load(example))


def test_the_sections_that_rows_name_are_there():
    text = job_page.page()
    headings = {line[3:].lower().replace(" ", "-") for line in re.findall(r"^## .*$", text, re.M)}
    named = set(re.findall(r"\]\(#([a-z-]+)\)", text))
    assert named and named <= headings


def test_types_bounds_and_defaults_are_in_words():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", job_page.page(), re.MULTILINE))
    assert rows["lr"].startswith("number, above 0 | `0.001` | peak")
    assert rows["schedule"].startswith("`cosine`, `constant` | `cosine` |")
    assert rows["plugins"].startswith("list of text | none |")
    assert rows["backbone"].startswith("component (`onetomany backbones`) | required |")
    assert rows["metric"].startswith("name (`onetomany metrics`) | none |")
    assert rows["sources"].startswith("list of text | none |"), "those of a target come last"
