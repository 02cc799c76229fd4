"""The commands that list and explain what a job may name."""

import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import __version__, cli
from pipeline.config import listing, registry, schema

COMPONENTS = [(command, kind) for command, kind in listing.KINDS.items()]


def onetomany(*arguments):
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("kind", registry.FOLDERS)
def test_every_component_and_every_option_is_documented(kind):
    for name, entry in registry.entries(kind).items():
        assert entry.documentation, f"{kind} {name} has no docstring"
        for option, field in entry.options.model_fields.items():
            assert field.description, f"option {option} of {kind} {name} has no description"


@pytest.mark.parametrize(("command", "kind"), COMPONENTS)
def test_a_command_lists_every_component_of_its_kind(command, kind):
    done = onetomany(command)
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines() if line[:1].strip()] == (
        registry.names(kind)
    )
    assert onetomany(command, "--list").output == done.output  # as one writes it for prepare


@pytest.mark.parametrize(("command", "kind"), COMPONENTS)
def test_a_command_explains_each_component_with_its_options(command, kind):
    for name, entry in registry.entries(kind).items():
        text = listing.describe(kind, name)
        assert listing.first_sentence(entry).lower() in " ".join(text.lower().split())
        assert all(f"\n  {option}: " in text for option in entry.options.model_fields)
        assert f"In a job: {listing.IN_A_JOB[kind].partition('{')[0]}" in text


def test_what_is_printed_for_a_job_is_read_by_one():
    places = (schema.Job, schema.Source, schema.Target, schema.Data)
    fields = {name for place in places for name in place.model_fields}
    for kind, form in listing.IN_A_JOB.items():
        assert yaml.safe_load(form.format("x")).keys() <= fields, kind
    (score,) = (
        line for line in listing.describe("score", "cka").splitlines() if "In a job" in line
    )
    fanout = schema.Fanout.model_validate(
        yaml.safe_load(score.removeprefix("In a job: "))["fanout"]
    )
    assert fanout.select.score == "cka"


def test_a_sentence_ends_at_its_full_stop_and_not_after_et_al():
    names = dict(listing.names("technique"))
    assert (
        names["lora"]
        == "Low-rank updates of frozen weights (Hu et al. 2022): W + (alpha / rank) B A"
    )
    assert names["zero_shot"] == "Test the source's backbone and head without any training"


def test_the_networks_of_a_library_are_found_by_a_part_of_their_names():
    text = listing.describe("model", "timm/resnet10t")
    assert "Networks (2):\n  legacy" not in text
    assert "resnet10t" in text and "In a job: backbone: timm/resnet10t" in text
    assert "more: onetomany backbones timm/PART" in listing.describe("model", "timm")
    with pytest.raises(ValueError, match="timm has no network whose name contains 'resnet10q'"):
        listing.describe("model", "timm/resnet10q")


def test_an_unknown_name_is_answered_by_the_nearest():
    done = onetomany("techniques", "lorra")
    assert done.exit_code == 2
    assert "unknown technique 'lorra'; did you mean lora" in done.output
    text = " ".join(onetomany("backbones", "bert").output.split())
    assert "unknown backbone 'bert'" in text and "did you mean" in text
    assert "transformers/bert (random weights)" in text and "hf-hub:bert" in text


def test_listing_imports_no_network_library():
    code = (
        "import sys; from pipeline.config import listing; "
        "[listing.names(kind) for kind in listing.KINDS.values()]; "
        "print([name for name in ('torch', 'ray', 'timm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_an_option_and_a_command():
    assert onetomany("--version").output == onetomany("version").output == f"{__version__}\n"
