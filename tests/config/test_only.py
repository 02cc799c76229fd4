"""The field ``only`` of a job, and --only: which sources and targets a part of a job has."""

import pytest

from pipeline.config import yaml_loader
from pipeline.config.schema import Job, JobError, spec_hash

JOB = """\
name: parts
sources:
  garments: {data: &pictures {uri: rows.parquet, modality: image, columns: {image: i, label: l}}, backbone: timm/resnet18, objective: classification}
  photos: {data: *pictures, backbone: timm/resnet18, objective: classification}
  reviews: {data: &texts {uri: rows.parquet, modality: text, columns: {text: t, label: l}}, backbone: transformers/bert, objective: classification}
  published: {backbone: "hf-hub:somebody/model"}
  stays: {data: {uri: rows.parquet, modality: table, columns: {features: f, label: l}}, backbone: table/ft_transformer, objective: classification}
  sonars: {data: &windows {uri: rows.parquet, modality: series, columns: {series: s}},
           backbone: hf/patchtst, objective: masked_series}
targets:
  tops: {data: *pictures, objective: classification, sources: [garments]}
  clothing: {data: *pictures, objective: classification, sources: [garments, photos]}
  restaurants: {data: *texts, objective: classification}
  faults: {data: {<<: *windows, columns: {series: s, label: l}}, objective: classification}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rows.parquet").touch()
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def part(file, *only: str) -> Job:
    return yaml_loader.load(file, [f"only=[{', '.join(only)}]"]).selected()


@pytest.mark.parametrize(
    ("only", "sources", "targets"),
    [
        (["tops"], ["garments"], ["tops"]),
        (["clothing"], ["garments", "photos"], ["clothing"]),
        (["photos"], ["photos"], ["clothing"]),
        (["garments"], ["garments"], ["tops", "clothing"]),
        (["vision"], ["garments", "photos"], ["tops", "clothing"]),
        (["image"], ["garments", "photos"], ["tops", "clothing"]),
        (["text"], ["reviews", "published"], ["restaurants"]),
        (["robotics"], ["published", "sonars"], ["faults"]),
        (["healthcare"], ["published", "stays", "sonars"], ["faults"]),
        (["table", "tops"], ["garments", "stays"], ["tops"]),
        (["restaurants", "stays"], ["reviews", "published", "stays"], ["restaurants"]),
    ],
    ids=" ".join,
)
def test_a_part_has_what_is_named_and_what_belongs_to_it(file, only, sources, targets):
    job = part(file, *only)
    assert list(job.sources) == sources and list(job.targets) == targets


def test_a_target_names_no_source_that_is_left_out(file):
    assert part(file, "photos").targets["clothing"].sources == ["photos"]
    assert part(file, "clothing").targets["clothing"].sources == ["garments", "photos"]
    assert part(file, "text").targets["restaurants"].sources is None


def test_without_it_the_job_is_whole_and_has_the_hash_that_it_had(file):
    job = yaml_loader.load(file)
    assert job.selected() is job and "only" not in job.model_dump(mode="json")
    assert spec_hash(yaml_loader.load(file, ["only=[]"])) == spec_hash(job)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("visoin", r"only\.0: no part of this job is named 'visoin'; did you mean vision"),
        ("top", r"named 'top'; did you mean tops"),
        ("speech", r"named 'speech'; valid names: clothing, .*healthcare.*vision"),
    ],
)
def test_a_name_that_the_job_does_not_have_is_refused(file, name, says):
    with pytest.raises(JobError, match=says):
        part(file, name)


@pytest.mark.parametrize(
    ("select", "remedy"), [("{budget: 60}", "select"), ("{budget: 60, top: 1}", "select.budget")]
)
def test_a_budget_of_the_whole_job_is_not_spent_on_a_part(file, select, remedy):
    file.write_text(f"{JOB}fanout: {{select: {select}}}\n")
    with pytest.raises(JobError, match=rf"only: .*budget \(60\).* \(--set fanout\.{remedy}=null\)"):
        part(file, "tops")
    job = yaml_loader.load(file, ["only=[tops]", f"fanout.{remedy}=null"])
    assert job.fanout.budget is None and list(job.selected().targets) == ["tops"]
