"""How the images of a checkpoint without data are read: what the job states, what a tag has, and
what is assumed is told.
"""

import warnings

import pytest
import torch
import yaml
from safetensors.torch import save_file
from web_server import web_server

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.checkpoints.pretrained import PretrainedCheckpoint
from pipeline.config import yaml_loader
from pipeline.config.schema import JobError
from pipeline.core.specs import Architecture
from pipeline.train import dry_checks, pretrain, row_checks, source

INPUTS = {"channels": 3, "size": 160}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def written(folder, **fields):
    """A job file with one source: timm's smallest ResNet from a weights file."""
    backbone = bundle.build_backbone(Architecture("timm/test_resnet", {}, INPUTS))
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()},
        folder / "w.safetensors",
    )
    spec = {"backbone": "timm/test_resnet", "init": f"file:{folder / 'w.safetensors'}", **fields}
    (folder / "job.yaml").write_text(
        yaml.safe_dump({"name": "toy", "storage": str(folder / "runs"), "sources": {"s": spec}})
    )
    return folder / "job.yaml"


def imported(path):
    stage = source.plan_source(yaml_loader.load(path), "s")
    metadata = pretrain.import_checkpoint(stage)
    return bundle.load(stage.bundle_uri), metadata, stage


def test_what_the_job_states_is_how_rows_are_read(tmp_path):
    plain, metadata, before = imported(written(tmp_path))
    assert plain.manifest.modality.state["mean"] == pytest.approx([0.5, 0.5, 0.5]), (
        "timm's own for test_resnet"
    )
    (message,) = (finding.text for finding in row_checks.findings_from_metadata(metadata))
    assert message.startswith(
        "images are read at 160 pixels, 3 channels, mean 0.5/0.5/0.5, std 0.5/0.5/0.5; "
        "assumed, as timm says of its default weights"
    )
    assert "set modality: {image: {mean: imagenet, std: imagenet}}" in message
    given = {
        "mean": "imagenet",
        "std": "imagenet",
        "size": 96,
        "crop_share": 0.875,
        "interpolation": "bicubic",
    }
    found, metadata, after = imported(written(tmp_path, modality={"image": given}))
    modality = found.modality()
    assert (
        modality.state["mean"],
        modality.state["std"],
    ) == IMAGENET and found.manifest.modality.state["mean"] == IMAGENET[0]
    assert modality.inputs() == {"channels": 3, "size": 96} == found.manifest.arch.inputs
    assert (modality.options.crop_share, modality.options.interpolation) == (0.875, "bicubic")
    (message,) = (finding.text for finding in row_checks.findings_from_metadata(metadata))
    assert (
        "mean 0.485/0.456/0.406" in message
        and "as the job states" in message
        and "assumed" not in message
    )
    assert before.key != after.key, "rows that are read otherwise are another source"
    assert metadata["findings"] == found.manifest.training["findings"], (
        "a run that finds it done tells it too"
    )


@pytest.mark.parametrize(
    "modality",
    [
        None,
        {"image": {"size": 96, "mean": "imagenet", "std": "imagenet"}},
        {"image": {"channels": 1}},
        {"image": {"mean": "imagenet"}},
        {"text": {}},
    ],
)
def test_a_dry_run_sees_what_the_run_would_make(tmp_path, modality):
    path = written(tmp_path, **({"modality": modality} if modality else {}))

    def outcome(make):
        """What a run or a dry run makes of the source, or its error."""
        try:
            return make()
        except BundleError as error:
            return str(error)

    def foreseen():
        found = dry_checks.plan_without_training(source.plan_source(yaml_loader.load(path), "s"))
        return found.arch.name, found.arch.inputs, found.modality

    def made():
        manifest = imported(path)[0].manifest
        return manifest.arch.name, manifest.arch.inputs, manifest.modality

    assert outcome(foreseen) == outcome(made)


def test_a_dry_run_fills_no_network_and_reads_no_weights(tmp_path, monkeypatch):
    load_into, devices = PretrainedCheckpoint.load_into, set()

    def watched(start, backbone):
        devices.update(parameter.device.type for parameter in backbone.parameters())
        return load_into(start, backbone)

    monkeypatch.setattr(PretrainedCheckpoint, "load_into", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(tmp_path)
        data = (tmp_path / "w.safetensors").read_bytes()
        with web_server() as web:
            uri = web.put("w.safetensors", data)
            stage = source.plan_source(yaml_loader.load(written(tmp_path, init=f"file:{uri}")), "s")
            web.requests.clear()
            dry_checks.plan_without_training(stage)
            assert web.bytes_asked() < len(data)
    assert devices == {"meta"}


def test_a_tag_is_a_name_of_a_backbone(tmp_path):
    found, metadata, _ = imported(written(tmp_path, backbone="timm/test_resnet.r160_in1k"))
    assert (
        found.manifest.arch.name == "timm/test_resnet"
        and found.modality().options.crop_share == 0.95
    )
    assert row_checks.findings_from_metadata(metadata)[0].text.endswith(
        "as timm says of test_resnet.r160_in1k"
    )


DATA = {"uri": "rows.parquet", "modality": "image", "columns": {"image": "image", "label": "label"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"backbone": "timm/test_resnet.in22k"},
            "sources.s.backbone: timm/test_resnet has no weights tagged 'in22k'; valid names: "
            "r160_in1k",
        ),
        (
            {"modality": {"image": {"means": "imagenet"}}},
            "sources.s.modality.image.means: unknown option of image; did you mean mean",
        ),
        (
            {"data": DATA, "objective": "classification", "modality": "image"},
            "sources.s.modality: it is for a checkpoint without data; these data say how "
            "their rows are read",
        ),
        (
            {"data": DATA, "objective": "classification", "backbone": "timm/test_resnet.r160_in1k"},
            "sources.s.backbone: a tag says how published weights read their images, and "
            "data.modality decides that here: write timm/test_resnet",
        ),
    ],
)
def test_a_mistake_is_told_with_its_field(fields, said, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(JobError) as caught:
        yaml_loader.load(written(tmp_path, **fields))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image": {"mean": "imagenet"}}, "sources.s.modality: std: None must be 3 numbers"),
        (
            {"image": {"fit": "squash", "crop_share": 0.5}},
            "sources.s.modality: crop_share 0.5 has no effect with fit: squash",
        ),
        (
            {"text": {}},
            "sources.s.modality: the checkpoint reads image, the job says text: leave it out",
        ),
    ],
)
def test_what_does_not_suit_the_checkpoint_is_reported(given, said, tmp_path):
    with pytest.raises(BundleError, match=said):
        imported(written(tmp_path, modality=given))


def test_a_crop_share_that_a_checkpoint_brings_is_not_told_where_nothing_is_cropped(tmp_path):
    found, metadata, _ = imported(
        written(tmp_path, backbone="timm/test_resnet.r160_in1k", modality={"image": {"fit": "pad"}})
    )
    assert found.modality().options.fit == "pad" and "crop_share" not in metadata["findings"][0][0]


def test_a_crop_keeps_its_share_of_the_shorter_side():
    """As timm: resized to size / crop_pct, then cropped."""
    from pipeline.media import image_io

    picture = torch.zeros(1, 512, 640, dtype=torch.uint8)
    picture[:, 64:448, 128:512] = 255  # the middle 384 of 512
    assert (image_io.resize(picture, 192, crop_share=0.75) == 255).float().mean() > 0.97
    assert (image_io.resize(picture, 192) == 255).float().mean() < 0.6
    for way in ("bilinear", "bicubic"):
        assert image_io.resize(picture, 96, interpolation=way).dtype == torch.uint8
