"""A bundle is whole or refused; a head is carried only by its labels' names; a transfer says what
it did.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_rows import OBJECTIVES
from toys import image_rows, label_state, net_task, take, task_of, weights

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.io import atomic_folder, storage

INPUTS = {"channels": 3, "size": 32}
MODALITY = ModalitySpec("image", {"size": 32, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})


def make(labels=("cat", "dog", "owl"), seed=0, name="timm/test_vit", **options):
    state = {"values": list(range(len(labels))), "labels": list(labels)}
    return task_of(name, INPUTS, "classification", state, seed=seed, options=options).eval()


@pytest.fixture(scope="module")
def task():
    return make()


@pytest.fixture(scope="module")
def batch():
    return take(image_rows(6, size=32, channels=3), np.arange(6))


@pytest.fixture
def saved(task, tmp_path):
    uri = str(tmp_path / "bundle")
    bundle.save(
        uri, task, MODALITY, parent="bundle:somewhere", metrics={"accuracy": 0.5}, spec_hash="abc"
    )
    return Path(uri)


def scores(task, batch):
    with torch.no_grad():
        return task.eval().objective.predict(task.backbone, batch)["scores"]


# ---------------------------------------------------------------- whole or refused


def test_a_bundle_gives_back_task_modality_and_facts(task, batch, saved):
    found = bundle.load(str(saved))
    assert torch.equal(scores(found.task(), batch), scores(task, batch))
    assert found.modality().inputs() == INPUTS and found.modality().state == MODALITY.state
    assert (
        found.manifest.parent == "bundle:somewhere"
        and found.manifest.metrics == {"accuracy": 0.5}
        and found.manifest.spec_hash == "abc"
    )
    assert (
        found.manifest.versions["torch"] == torch.__version__.partition("+")[0]
        or found.manifest.versions["torch"] == torch.__version__
    )
    assert set(found.backbone_tensors()) == set(task.backbone.state_dict())
    assert bundle.exists(str(saved)) and not bundle.exists(str(saved.parent / "other"))


def test_a_bundle_holds_no_code(saved):
    """safetensors and JSON, nothing that unpickles."""
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", "weights.safetensors"]
    json.loads((saved / "manifest.json").read_text())
    with pytest.raises(Exception):  # noqa: B017 - whatever pickle says
        pickle.loads((saved / "weights.safetensors").read_bytes())


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_flipped_bit_is_found(saved, part):
    path = saved / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(storage.StorageError, match=r"weights\.safetensors"):
        bundle.load(str(saved))


def test_a_cut_file_is_found(saved):
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(storage.StorageError, match=r"weights\.safetensors"):
        bundle.load(str(saved))


def test_a_flipped_bit_in_the_manifest_is_found(saved):
    """Label names and pixel means stand there: one flipped digit is still JSON."""
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["modality"]["state"]["std"][0] = 0.3
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(storage.StorageError, match=r"manifest\.json"):
        bundle.load(str(saved))


def test_missing_parts_are_found(saved):
    (saved / "weights.safetensors").unlink()
    with pytest.raises(storage.StorageError, match=r"weights\.safetensors"):
        bundle.load(str(saved))
    (saved / "manifest.json").unlink()
    with pytest.raises(storage.StorageError, match=r"manifest\.json"):
        bundle.load(str(saved))
    assert not bundle.exists(str(saved))


def test_a_newer_format_is_refused(saved):
    change(saved, format_version=bundle.FORMAT_VERSION + 1)
    with pytest.raises(
        BundleError, match=r"the bundle has format 3, this program reads up to 2; update onetomany"
    ):
        bundle.load(str(saved))


@pytest.mark.parametrize(
    "extra", [{"kind": "resume point"}, {"format_version": None}, {"format_version": "1"}]
)
def test_another_folder_is_no_bundle(saved, extra):
    change(saved, **extra)
    with pytest.raises(BundleError, match="this folder is not a bundle"):
        bundle.load(str(saved))


def change(folder: Path, **extra) -> None:
    path = folder / "manifest.json"
    path.write_text(
        json.dumps(atomic_folder.with_checksum({**json.loads(path.read_text()), **extra}))
    )


def test_saving_again_replaces_the_whole(task, batch, saved):
    other = make(seed=9)
    bundle.save(str(saved), other, MODALITY)
    found = bundle.load(str(saved))
    assert (
        torch.equal(scores(found.task(), batch), scores(other, batch))
        and found.manifest.parent is None
    )


def test_a_backbone_alone_is_a_bundle_without_a_head(task, tmp_path):
    uri = str(tmp_path / "b")
    bundle.save(uri, task.backbone, MODALITY)
    found = bundle.load(uri)
    assert found.backbone_tensors().keys() == task.backbone.state_dict().keys()
    with pytest.raises(
        BundleError, match="this bundle is a backbone without a head; fine-tune it first"
    ):
        found.task()


def test_channels_last_weights_are_stored_as_any_others(batch, tmp_path):
    plain = make(name="timm/test_resnet")
    want = scores(plain, batch)
    bundle.save(str(tmp_path / "b"), plain.to(memory_format=torch.channels_last), MODALITY)
    again = bundle.load(str(tmp_path / "b")).task()
    assert (scores(again, batch) - want).abs().max() < 1e-5
    assert all(p.is_contiguous() for p in again.parameters())


# ---------------------------------------------------------------- heads


def loaded(task, tmp_path, name="b"):
    bundle.save(str(tmp_path / name), task, MODALITY)
    return bundle.load(str(tmp_path / name))


def carried(old, new, tmp_path):
    """The old backbone under the new task, and its head if it is kept."""
    found = loaded(old, tmp_path)
    bundle.transfer(new.backbone, found.backbone_tensors(), "b")
    return bundle.carry_head(new, found)


def test_the_same_labels_keep_their_head(task, batch, tmp_path):
    new = make(seed=5)
    assert carried(task, new, tmp_path) == "head kept: the same labels"
    assert torch.equal(scores(new, batch), scores(task, batch))


@pytest.mark.parametrize(
    "labels", [("owl", "cat", "dog"), ("dog", "cat", "owl"), ("owl", "dog", "cat")]
)
def test_permuted_labels_are_put_into_their_new_order(task, batch, tmp_path, labels):
    new = make(labels, seed=5)
    assert carried(task, new, tmp_path) == "head kept: the same labels, put into their new order"
    a, b = scores(task, batch), scores(new, batch)
    for i, name in enumerate(("cat", "dog", "owl")):
        assert torch.equal(a[:, i], b[:, labels.index(name)])


def test_other_labels_get_a_new_head_that_says_so(task, tmp_path):
    for labels, named in (
        (("cat", "dog", "emu"), "2 names, e.g. emu, owl"),
        (("cat", "dog"), "1 names, e.g. owl"),
        (("cat", "dog", "owl", "yak"), "1 names, e.g. yak"),
    ):
        new = make(labels, seed=5)
        before = weights(new.objective)
        assert carried(task, new, tmp_path) == f"new head: its labels differ from these ({named})"
        # Of the same shape or not
        assert all(torch.equal(before[n], t) for n, t in weights(new.objective).items())


def test_a_head_with_two_labels_of_one_name_is_new_in_another_order(tmp_path):
    """A crane is a bird or a machine. In the very same order they are the same."""
    cranes = ("crane", "cat", "crane")
    new = make(("cat", "crane"), seed=5)
    found = carried(make(cranes, seed=1), new, tmp_path)
    assert found.startswith("new head: two labels have the same name")
    new = make(cranes, seed=5)
    assert carried(make(cranes, seed=1), new, tmp_path) == "head kept: the same labels"


def test_another_objective_gets_a_new_head(tmp_path):
    from toys import SMALL, text_modality

    modality = text_modality()
    old, new = (
        task_of("transformers/bert", modality.inputs(), name, state, **SMALL)
        for name, state in (("mlm", {}), ("classification", label_state()))
    )
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    bundle.save(str(tmp_path / "b"), old, spec)
    assert (
        bundle.carry_head(new, bundle.load(str(tmp_path / "b")))
        == "new head: the objective was mlm, now it is classification"
    )
    twin = task_of("transformers/bert", modality.inputs(), "mlm", seed=8, **SMALL)
    assert bundle.carry_head(twin, bundle.load(str(tmp_path / "b"))) == "head kept: the same labels"
    assert all(
        torch.equal(t, old.objective.state_dict()[n])
        for n, t in twin.objective.state_dict().items()
    )


def test_a_head_for_other_features_is_new(tmp_path):
    """The same labels, but another backbone's width."""
    wide = make(seed=1, name="timm/test_resnet")
    assert bundle.carry_head(wide, loaded(make(), tmp_path)) == "new head: its options differ"


@pytest.mark.parametrize("objective", ["classification", "tagging"])
def test_a_head_with_another_norm_is_new(objective, tmp_path):
    """It has the same shapes and labels, and reads other features."""
    task = OBJECTIVES[objective].build(objective).task
    spec = ObjectiveSpec(objective, task.objective.options.model_dump(), task.objective.state)
    saved = loaded(task, tmp_path)
    other = replace(spec, options={**spec.options, "norm": not spec.options["norm"]})
    for asked, expected in (
        (spec, "head kept"),
        (other, "new head: the bundle's head was trained with another"),
    ):
        new = bundle.build_task(task.backbone.arch, asked, seed=5)
        before = weights(new.objective)
        assert bundle.carry_head(new, saved).startswith(expected)
        is_same = all(torch.equal(before[n], t) for n, t in weights(new.objective).items())
        assert is_same == (asked is other)


# ---------------------------------------------------------------- transfer


def test_transfer_reports_kept_new_and_dropped(task):
    backbone = make(seed=3, name="timm/test_resnet").backbone
    tensors = {
        n: t + 1 for n, t in backbone.state_dict().items() if not n.endswith("num_batches_tracked")
    }
    found = bundle.transfer(
        backbone,
        {**tensors, "model.fc.weight": torch.zeros(2), "model.fc.bias": torch.zeros(1)},
        "a file",
        ignored_prefixes=("model.fc.",),
    )
    counters = [n for n in backbone.state_dict() if n.endswith("num_batches_tracked")]
    assert (
        found.dropped == ("model.fc.weight", "model.fc.bias")
        and list(found.new) == counters
        and set(found.kept) == set(tensors)
    )
    assert all(torch.equal(backbone.state_dict()[n], t) for n, t in tensors.items())
    assert (
        found.text()
        == f"{len(tensors)} tensors kept, {len(counters)} new ({', '.join(counters[:4])}, ...), 2 "
        "dropped (model.fc.weight, model.fc.bias)"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model\.norm\.weight is \(7,\) there and \(64,\) here",
        ),
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing \(model\.norm\.weight\)"),
        (
            lambda t: t.update({"model.extra": torch.zeros(1)}),
            r"1 tensors have no place \(model\.extra\)",
        ),
        (
            lambda t: t.update(
                {"model.fc.weight": torch.zeros(1), "model.other.weight": torch.zeros(1)}
            ),
            r"1 tensors have no place \(model\.other\.weight\)",
        ),
        (lambda t: t.clear(), r"\d+ tensors are missing \(model\.cls_token, "),
    ],
)
def test_transfer_is_strict_and_all_or_nothing(task, spoil, message):
    backbone = make(seed=3).backbone
    before = weights(backbone)
    tensors = dict(task.backbone.state_dict())
    spoil(tensors)
    with pytest.raises(BundleError, match=r"^a file does not fit timm/test_vit: .*" + message):
        bundle.transfer(backbone, tensors, "a file", ignored_prefixes=("model.fc.",))
    assert all(torch.equal(before[n], t) for n, t in weights(backbone).items())


def test_nothing_may_be_left_over_unless_it_is_named(task):
    tensors = {**task.backbone.state_dict(), "model.fc.weight": torch.zeros(1)}
    with pytest.raises(BundleError, match="have no place"):
        bundle.transfer(make(seed=3).backbone, tensors, "a file")


# ---------------------------------------------------------------- seeds


def test_seeds_of_backbone_and_head_are_apart():
    def built(seed, head_seed=None):
        return bundle.build_task(
            Architecture("timm/test_vit", {}, INPUTS),
            ObjectiveSpec("classification", {}, label_state()),
            seed=seed,
            head_seed=head_seed,
        )

    a, b, c, d = built(1, 2), built(1, 2), built(1, 3), built(4, 2)

    def same(x, y, part):
        pairs = zip(getattr(x, part).parameters(), getattr(y, part).parameters(), strict=True)
        return all(torch.equal(p, q) for p, q in pairs)

    assert same(a, b, "backbone") and same(a, b, "objective")
    assert same(a, c, "backbone") and not same(a, c, "objective")
    assert not same(a, d, "backbone") and same(a, d, "objective")


def test_an_unregistered_backbone_cannot_be_loaded_back(tmp_path):
    """What is stored is a name; a name that nobody registered is refused with the valid ones."""
    bundle.save(str(tmp_path / "b"), net_task(), MODALITY)
    with pytest.raises(
        ValueError,
        match="unknown model 'toys'; valid names: events, hf, policy, table, timm, torchaudio, "
        "transformers, wavenet",
    ):
        bundle.load(str(tmp_path / "b")).task()
