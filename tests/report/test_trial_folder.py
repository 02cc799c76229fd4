"""Folders of trials: names that a person reads, safe on every file system and on S3."""

from __future__ import annotations

import re

import pytest

from pipeline.io import storage
from pipeline.report import trial_folder
from pipeline.report.trial_folder import name_folder, safe_name

ONE, OTHER = "3f2a9c0b71de", "aaaaaaaaaaaa"


def named(*names: str, seed: int = 0, stage: str = "final", trial_id: str = ONE) -> str:
    names = (*names, *("clothing", "garments", "full", "1.0")[len(names) :])
    return name_folder(*names, seed, stage, trial_id)


def test_a_folder_says_target_source_technique_labels_and_seed():
    assert named() == f"trials/clothing/garments/full/labels-1.0/seed0-{ONE}"
    assert (
        named("clothing", "timm/resnet18", "lp_ft(probe_share=0.3)", "25/class", seed=2)
        == f"trials/clothing/timm-resnet18/lp_ft-probe_share-0.3/labels-25-per-class/seed2-{ONE}"
    )
    searched = named("clothing", "garments", "full", "5 episodes", seed=1000, stage="search")
    assert searched == f"trials/clothing/garments/full/labels-5-episodes/search-seed1000-{ONE}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", "a-b"),
        ("../../etc/passwd", "etc-passwd"),
        ("c:\\data", "c-data"),
        ("größe café", "gro-e-cafe"),
        (".hidden", "hidden"),
        ("ends with a dot.", "ends-with-a-dot"),
        ('a"b<c>|d?*e\n', "a-b-c-d-e"),
        ("a%20b#c&d", "a-20b-c-d"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        (OTHER, f"_{OTHER}"),
        ("teacher=https://me:pass@host/x?signature=secret", "teacher-https-host-x"),
    ],
)
def test_odd_names_become_safe_ones(text, name):
    assert safe_name(text) == name


def test_names_without_a_safe_character_are_told_apart():
    """By a hash that is the same each time: it is where a run goes on."""
    assert safe_name("衣類") == "name-24e039" != safe_name("靴")
    assert re.fullmatch(r"name-[0-9a-f]{6}", safe_name(".."))


def test_long_names_are_cut_and_the_id_tells_them_apart():
    long = ["x" * 300 + str(number) for number in range(2)]
    first, second = (
        named(*[one] * 3, trial_id=i) for one, i in zip(long, (ONE, OTHER), strict=True)
    )
    assert first != second and len(first) < 240
    assert max(map(len, first.split("/"))) <= max(trial_folder.MAX_CHARACTERS, len(f"seed0-{ONE}"))


def test_names_that_differ_in_case_alone_are_told_apart_by_the_id():
    """On macOS and Windows ``Cats`` and ``cats`` are one folder."""
    first, second = named("Cats", trial_id=ONE), named("cats", trial_id=OTHER)
    assert first.lower() != second.lower()


def test_all_trials_of_a_job_are_found_and_removed(root):
    """Those of both versions, with the folders that are then empty."""
    assert trial_folder.find_all(root) == {} and trial_folder.ids_in_old_layout(root) == frozenset()
    mine, older, beside = (
        named(),
        trial_folder.old_layout_folder(OTHER),
        named(OTHER, trial_id="b" * 12),
    )
    for folder in (mine, older, beside):
        storage.write_bytes(storage.join(root, folder, "bundle", "manifest.json"), b"{}")
    storage.write_bytes(storage.join(root, "trials", "notes.txt"), b"mine")
    assert trial_folder.find_all(root) == {ONE: mine, OTHER: older, "b" * 12: beside}
    assert trial_folder.ids_in_old_layout(root) == {OTHER}
    trial_folder.remove(root, mine)
    trial_folder.remove(root, older)
    assert trial_folder.find_all(root) == {"b" * 12: beside}
    assert storage.list_folders(storage.join(root, "trials")) == [f"_{OTHER}"]


@pytest.mark.parametrize("root", ["runs/job", "s3://bucket/runs/job", "/trials/job"])
def test_a_bundle_says_its_job_and_its_trial(root):
    for folder in (named("trials"), trial_folder.old_layout_folder(ONE), named(stage="search")):
        assert trial_folder.split_bundle(f"{root}/{folder}/bundle") == (root, ONE)
    for other in (f"{root}/sources/garments-{ONE}/bundle", f"{root}/trials/x/bundle"):
        assert trial_folder.split_bundle(other) is None


def test_an_older_trial_stays_where_it_is():
    names = ("clothing", "garments", "full", "1.0", 0, "final")
    assert name_folder(*names, ONE, {ONE}) == f"trials/{ONE}"
    assert name_folder(*names, OTHER, {ONE}) == named(trial_id=OTHER)
