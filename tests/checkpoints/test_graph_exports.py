"""ONNX and torch.export files give what the bundle gives; their READMEs run without this package."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from contract_rows import BACKBONES, OBJECTIVES, classified, demonstrations, pictures
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from toys import SMALL, episodes, image_file, label_state, task_of

from pipeline.checkpoints import bundle, export, export_check, graph, graph_readme
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.batch import Batch
from pipeline.core.specs import ModalitySpec
from pipeline.media import language_model
from pipeline.modalities.text import Text

LONG = ["multilabel", "qa", "ctc", "segmentation", "detection", "regression", "hourly"]
CASES = [
    ("tagging", ""),
    *(pytest.param(objective, "", marks=pytest.mark.slow) for objective in LONG),
    pytest.param("ctc", "torchaudio/conformer", marks=pytest.mark.slow),
]
"""Translating takes seconds: one objective in the quick tier."""


def saved(folder, task, modality, **extra) -> str:
    state = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    bundle.save(str(folder / "b"), task, state, **extra)
    return str(folder / "b")


def bundled(folder, objective: str, backbone: str = ""):
    case = OBJECTIVES[objective]
    if backbone:
        case = replace(case, backbone=backbone, backbone_options=BACKBONES[backbone][1])
    built = case.build(objective)
    return built.task.eval(), saved(folder, built.task, built.rows.decoder.modality)


def program(folder, task, modality):
    uri = saved(folder, task, modality)
    return graph.trace(bundle.load(uri), False)


@pytest.mark.parametrize(("objective", "backbone"), CASES)
def test_onnxruntime_gives_what_the_bundle_gives(objective, backbone, tmp_path):
    """Here against the task in memory, on rows that the export has not seen."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task, uri = bundled(tmp_path, objective, backbone)
    said = export.export_bundle(uri, str(tmp_path / "out"), "onnx", False)
    assert re.search(r"largest difference of \w+ in batches of 4, 1, 3, 2 rows \d", said), said
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    modality = bundle.load(uri).modality()
    made = modality.random_rows(5, np.random.default_rng(7), 0.8)
    batch = modality.finish(Batch(np.arange(5), torch.arange(5), made))
    arrays = {one.name: batch[one.name].numpy() for one in session.get_inputs()}
    theirs = dict(
        zip([one.name for one in session.get_outputs()], session.run(None, arrays), strict=True)
    )
    with torch.no_grad():
        ours = task.objective.raw_outputs(task.backbone, batch)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert name == "frames" or tensor.std() > 1e-3
        np.testing.assert_allclose(theirs[name], tensor.numpy(), rtol=1e-4, atol=1e-4)
    described = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert described["inputs"].keys() == arrays.keys()
    assert all(one["shape"][0] == "batch" for one in described["inputs"].values())
    assert described["labels"] == task.objective.state.get("labels")


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param("events/gru", marks=pytest.mark.slow),
        "events/strats",
        "table/ft_transformer",
        pytest.param("torchaudio/conformer", marks=pytest.mark.slow),
    ],
)
def test_every_modality_is_traced(backbone, tmp_path):
    task, rows = classified(backbone)
    traced = program(tmp_path, task, rows.decoder.modality)
    compared = graph.compare(traced, "b", traced.program.module())
    assert compared.rows == 10 and compared.difference < 1e-5
    assert all(shape[0] == "batch" for shape in traced.dimensions.values())
    lengths = {name for shape in traced.dimensions.values() for name in shape[1:] if name}
    assert lengths == ({"length"} if backbone != "table/ft_transformer" else set())


def test_the_description_has_the_mean_in_use(tmp_path):
    """A grey target of a source with colours has one mean, not three."""
    task = task_of("timm/test_resnet", {"channels": 1, "size": 64}, "classification", label_state())
    state: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    spec = ModalitySpec("image", {"size": 64, "channels": 1}, state)
    bundle.save(str(tmp_path / "b"), task, spec)
    traced: Any = SimpleNamespace(
        samples=[({"image": torch.zeros(1, 1, 64, 64)}, {"scores": torch.zeros(1, 3)})],
        dimensions={"image": ["batch", "", "", ""]},
        meaning="",
    )
    graph_readme.write(bundle.load(str(tmp_path / "b")), traced, tmp_path, "model.onnx", "")
    described = json.loads((tmp_path / "graph.json").read_text())
    assert described["modality"]["state"] == {"mean": [0.5], "std": [0.2]}
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()  # it may be published


@pytest.mark.parametrize("output", ["scores", "features"])
def test_the_readme_says_which_threshold_decides(output, tmp_path):
    task = task_of("timm/test_resnet", {"channels": 1, "size": 64}, "classification", label_state())
    task.objective.state = {**task.objective.state, "threshold": 0.125}
    state: dict[str, Any] = {"mean": [0.5], "std": [0.2]}
    spec = ModalitySpec("image", {"size": 64, "channels": 1}, state)
    bundle.save(str(tmp_path / "b"), task, spec)
    traced: Any = SimpleNamespace(
        samples=[({"image": torch.zeros(1, 1, 64, 64)}, {output: torch.zeros(1, 3)})],
        dimensions={"image": ["batch", "", "", ""]},
        meaning="",
    )
    graph_readme.write(bundle.load(str(tmp_path / "b")), traced, tmp_path, "model.onnx", "")
    described = json.loads((tmp_path / "graph.json").read_text())
    readme = (tmp_path / "README.md").read_text()
    if output == "scores":
        assert described["threshold"] == 0.125
        assert described["threshold_of"].endswith("from which a row is called class 1")
        assert "0.125, is the probability (softmax) from which a row is called class 1" in readme
    else:
        assert "threshold" not in described and "threshold" not in readme


def test_the_description_names_the_file_of_a_language_model_alone(tmp_path):
    """The folder may be published."""
    task, _ = bundled(tmp_path, "ctc")
    searched = {"beam": 5, "lm": "/home/alice/secret/characters.arpa"}
    task.objective.options = task.objective.options.model_copy(update=searched)
    uri = saved(tmp_path, task, OBJECTIVES["ctc"].build("ctc").rows.decoder.modality)
    traced: Any = SimpleNamespace(samples=[({}, {})], dimensions={}, meaning="")
    graph_readme.write(bundle.load(uri), traced, tmp_path, "model.onnx", "")
    described = json.loads((tmp_path / "graph.json").read_text())
    assert described["objective_options"]["lm"] == "characters.arpa"
    assert not (tmp_path / "characters.arpa").exists()
    file = tmp_path / "there" / "characters.arpa"
    file.parent.mkdir()
    file.write_bytes(b"a language model")
    state = {**task.objective.state, "lm": language_model.copy_file(str(file))._asdict()}
    task.objective.state = state
    uri = saved(tmp_path, task, OBJECTIVES["ctc"].build("ctc").rows.decoder.modality)
    graph_readme.write(bundle.load(uri), traced, tmp_path, "model.onnx", "")
    assert (tmp_path / "characters.arpa").read_bytes() == b"a language model"
    described = json.loads((tmp_path / "graph.json").read_text())
    assert "lm" not in described["objective_state"]


@pytest.mark.slow
def test_labels_of_each_hour_are_traced_at_all_hours(tmp_path):
    """Up to a row's last event the graph gives what the bundle predicts for new rows."""
    task, uri = bundled(tmp_path, "hourly")
    traced = graph.trace(bundle.load(uri), False)
    module = traced.program.module()
    assert graph.compare(traced, "b", module).difference < 1e-5
    modality = bundle.load(uri).modality()
    made = modality.random_rows(5, np.random.default_rng(7), 0.8)
    batch = modality.finish(Batch(np.arange(5), torch.arange(5), made))
    theirs = module({name: batch[name] for name in traced.dimensions})["scores"]
    with torch.no_grad():
        ours = task.objective.predict(task.backbone, batch)
    hours = ours["times"].shape[1]
    assert theirs.shape[1] == task.objective.state["hours"] >= hours > 1
    real = ours["times"].isfinite()
    assert real.sum(1).unique().numel() > 1, "rows end at different hours"
    torch.testing.assert_close(theirs[:, :hours][real], ours["scores"][real], rtol=1e-5, atol=1e-5)
    assert theirs.std(1).min() > 1e-4


@pytest.mark.parametrize("kind", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_long_recurrent_network_is_traced_without_its_steps(kind, tmp_path, monkeypatch):
    """torch would run each of 2000 hours to know a shape, which takes minutes."""
    from torch._decomp import decompositions

    def refuse(*arguments):
        raise AssertionError("a step is run")

    monkeypatch.setattr(decompositions, "gru_cell", refuse)
    case = OBJECTIVES["hourly"].build("hourly")
    modality = case.rows.decoder.modality
    options = modality.options.model_copy(update={"hours": 2000.0})
    modality = type(modality)(options, modality.state)
    state = {**case.task.objective.state, "hours": 2000.0}
    task = task_of("events/gru", modality.inputs(), "hourly", state, **BACKBONES["events/gru"][1])
    uri = saved(tmp_path, task, modality)
    said = export.export_bundle(uri, str(tmp_path / "out"), kind, False)
    assert "largest difference of scores in batches of 4, 1, 3, 2 rows" in said


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["policy/mlp", "policy/transformer"])
def test_a_policy_is_exported_with_its_statistics(architecture, tmp_path):
    modality_kind = demonstrations().fitted(architecture)
    table = episodes(8, robots=("arm",))
    columns = {name: name for name in ("observations", "actions", "embodiment")}
    modality = type(modality_kind)(
        modality_kind.options,
        type(modality_kind).fit(modality_kind.options, table, columns, architecture),
    )
    state = {"kind": "continuous", "columns": []}
    task = task_of(architecture, modality.inputs(), "behaviour_cloning", state, width=16)
    uri = saved(tmp_path, task, modality)
    export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    described = json.loads((tmp_path / "out" / "graph.json").read_text())
    space = described["modality"]["state"]["spaces"]["arm"]
    assert space["action_mean"] == modality.state["spaces"]["arm"]["action_mean"]
    assert ("executed" in described["inputs"]) == (architecture == "policy/transformer")
    traced = torch.export.load(tmp_path / "out" / "model.pt2").module()
    arrays, _ = modality.decode(table, columns)
    batch = modality.finish(Batch(np.arange(8), torch.arange(8), modality.collate(arrays)))
    batch = batch.replace(executed=batch["actions"])
    with torch.no_grad():
        ours = task.eval().objective.predict(task.backbone, batch.replace(graded=batch["space"]))
        theirs = traced({name: batch[name] for name in described["inputs"]})["actions"]
    error = (theirs[:, :, 0] - batch["actions"]).square().mean(-1) * batch["mask"]
    assert theirs.shape[:2] == batch["mask"].shape and error.sum() > 0
    std = batch["action_std"][:, None]
    in_units = ((theirs[:, :, 0] - batch["actions"]) * std).square().sum(-1) * batch["mask"]
    torch.testing.assert_close(in_units.sum(1), ours["squared_error"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("torch-export", "policy/mlp"),
        *(
            pytest.param(kind, architecture, marks=pytest.mark.slow)
            for kind, architecture in (
                ("torch-export", "policy/transformer"),
                ("onnx", "policy/mlp"),
                ("onnx", "policy/transformer"),
            )
        ),
    ],
)
def test_one_graph_holds_a_policy_of_several_robots(kind, architecture, tmp_path):
    """It gives each row the actions of its own space, also where all rows are of one."""
    modality = demonstrations().fitted(architecture)
    state = {"kind": "continuous", "columns": []}
    task = task_of(
        architecture, modality.inputs(), "behaviour_cloning", state, options={"chunk": 2}, width=16
    )
    uri = saved(tmp_path, task.eval(), modality)
    said = export.export_bundle(uri, str(tmp_path / "out"), kind, False)
    assert "largest difference of actions in batches of 4, 1, 3, 2 rows" in said
    described = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert [*described["modality"]["state"]["spaces"]] == ["arm", "cart"]
    if kind == "onnx":
        file = str(tmp_path / "out" / "model.onnx")
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
    else:
        module = torch.export.load(tmp_path / "out" / "model.pt2").module()
    columns = {name: name for name in ("observations", "actions", "embodiment")}
    for robots in (("arm", "cart"), ("cart",)):
        arrays, _ = modality.decode(episodes(5, seed=3, robots=robots), columns)
        batch = modality.finish(Batch(np.arange(5), torch.arange(5), modality.collate(arrays)))
        assert batch["space"].unique().numel() == len(robots)
        batch = batch.replace(executed=batch["actions"])
        inputs = {name: batch[name] for name in described["inputs"]}
        if kind == "onnx":
            [theirs] = session.run(None, {name: one.numpy() for name, one in inputs.items()})
            theirs = torch.from_numpy(theirs)
        else:
            theirs = module(inputs)["actions"]
        new = Batch(batch.rows, batch.keys, {**inputs, "task": batch["task"]})
        with torch.no_grad():
            ours = task.objective.predict(task.backbone, new)["action"]
        assert theirs.shape == (*ours.shape[:2], 2, ours.shape[2]) and theirs.std() > 1e-2
        real = batch["mask"]
        torch.testing.assert_close(theirs[:, :, 0][real], ours[real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
@pytest.mark.parametrize("objective", ["detection", "instance_segmentation"])
def test_two_stage_detectors_give_the_bundles_detections(objective, kind, tmp_path):
    """After the user's threshold they are those of `predict`, also where images are padded.

    One image has detections and one has none.
    """
    modality = OBJECTIVES[objective].build(objective).rows.decoder.modality
    state = OBJECTIVES[objective].build(objective).task.objective.state
    own = {"method": "faster_rcnn"} if objective == "detection" else {"mask_convs": 1}
    options = {"channels": 64, "anchor": 4.0, "score_threshold": 0.0, **own}

    def task_with(**more):
        inputs = modality.inputs()
        task = task_of("timm/test_resnet", inputs, objective, state, options={**options, **more})
        parts = task.objective.detector
        for part in (parts.rpn.head, parts.roi_heads.box_predictor):
            for parameter in part.parameters():
                parameter.data.mul_(20)  # scores and boxes that differ
        return task.eval()

    side = modality.options.size
    made = modality.random_rows(3, np.random.default_rng(7), 1.0)
    batch = modality.finish(Batch(np.arange(3), torch.arange(3), made))
    frames = [[side, side, 0, 0], [side - 40, side, 20, 0], [side, side - 60, 0, 30]]
    image = batch["image"] * torch.tensor([1.0, 0.3, 0.1])[:, None, None, None]
    inputs = {"image": image, "frame": torch.tensor(frames, dtype=torch.float32)}
    batch = Batch(batch.rows, batch.keys, inputs)
    with torch.no_grad():
        task = task_with()
        surest = task.objective.predict(task.backbone, batch)["scores"].amax(1).sort()[0]
        assert surest[1] - surest[0] > 1e-3
        task = task_with(score_threshold=float(surest[:2].mean()))
        ours = task.objective.predict(task.backbone, batch)
    found = (ours["classes"] >= 0).sum(1)
    assert found.min() == 0 and (found > 0).sum() == 2
    uri = saved(tmp_path, task, modality)
    said = export.export_bundle(uri, str(tmp_path / "out"), kind, False)
    assert re.search(r"largest difference of \w+ in batches of 4, 1, 3, 2 rows \d", said), said
    described = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert [*described["inputs"]] == ["image", "frame"]
    if kind == "onnx":
        file = str(tmp_path / "out" / "model.onnx")
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        arrays = session.run(None, {name: inputs[name].numpy() for name in described["inputs"]})
        theirs = dict(zip(described["outputs"], map(torch.from_numpy, arrays), strict=True))
    else:
        theirs = torch.export.load(tmp_path / "out" / "model.pt2").module()(inputs)
        assert "import torchvision" in (tmp_path / "out" / "README.md").read_text()
    assert [*theirs] == ["boxes", "scores", "classes", *(["masks"] if "masks" in ours else [])]
    for row in range(3):
        is_sure = theirs["scores"][row] > described["objective_options"]["score_threshold"]
        of_row = {name: theirs[name][row][is_sure][None] for name in theirs}
        expected = {name: ours[name][row][: found[row]][None] for name in theirs}
        of_row = export_check.in_order_of(expected, of_row)
        for name, tensor in expected.items():
            torch.testing.assert_close(of_row[name], tensor, rtol=1e-4, atol=1e-4)


def test_detections_that_are_as_sure_may_swap_and_no_more():
    ours = {
        "boxes": torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)),
        "scores": torch.tensor([[0.5, 0.5, 0.1]] * 2),
        "classes": torch.tensor([[0, 1, -1]] * 2),
    }
    swapped = {name: tensor[:, [1, 0, 2]] for name, tensor in ours.items()}
    found = export_check.in_order_of(ours, swapped)
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.items())
    twice = {name: tensor[:, [0, 0, 2]] for name, tensor in ours.items()}
    found = export_check.in_order_of(ours, twice)
    assert not torch.equal(found["boxes"], ours["boxes"]), "one detection is lost"


def in_folder(folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """Run the code of an export's README as a script in its folder."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "pipeline" not in code
    (folder / "run.py").write_text(code)
    monkeypatch.chdir(folder)
    return runpy.run_path("run.py")["outputs"]


@pytest.mark.slow
def test_the_readme_prepares_a_picture_as_the_modality_does(tmp_path, monkeypatch):
    """Smooth pixels, so that only rounding differs."""
    modality = pictures(fit="pad").fitted("timm/test_resnet")
    task = task_of("timm/test_resnet", modality.inputs(), "classification", label_state(), seed=1)
    uri = saved(tmp_path, task, modality)
    export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    y, x = np.mgrid[0:70, 0:50]
    pixels = np.stack([y * 3, x * 5, y + x], -1).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "out" / "picture.png")
    theirs = in_folder(tmp_path / "out", monkeypatch)["scores"]
    arrays, _ = modality.decode(pa.table({"image": [image_file(pixels)]}), {"image": "image"})
    batch = modality.finish(Batch(np.arange(1), torch.arange(1), modality.collate(arrays)))
    with torch.no_grad():
        ours = task.eval().objective.logits(task.backbone, batch)
    np.testing.assert_allclose(theirs, ours.numpy(), atol=0.02)
    assert ours.std() > 0.1


@pytest.mark.slow
def test_the_readme_tokenizes_words_as_the_modality_does(tmp_path, monkeypatch):
    task, uri = bundled(tmp_path, "tagging")
    export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    theirs = in_folder(tmp_path / "out", monkeypatch)["scores"]
    modality = bundle.load(uri).modality()
    assert isinstance(modality, Text)
    table = pa.table({"text": [["A", "text", "."], ["Another", "one", "."]]})
    arrays, _ = modality.decode(table, {"text": "text"})
    batch = modality.finish(Batch(np.arange(2), torch.arange(2), modality.collate(arrays)))
    with torch.no_grad():
        ours = task.objective.logits(task.backbone, batch).numpy()
    real = batch["mask"].numpy()
    width = theirs.shape[1]
    np.testing.assert_allclose(theirs[real[:, :width]], ours[real], atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "backbone", "reason"),
    [
        (
            "ctc",
            "torchaudio/deepspeech",
            r"cannot trace torchaudio/deepspeech with ctc: .*a layer RNN over rows of several",
        ),
        ("clm", "", "clm has no outputs that a graph of tensors could give; --backbone-only"),
    ],
)
def test_what_no_graph_holds_is_refused_with_the_reason(objective, backbone, reason, tmp_path):
    _, uri = bundled(tmp_path, objective, backbone)
    with pytest.raises(BundleError, match=reason):
        export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    assert not (tmp_path / "out").exists()
    assert export.can_be_graph(uri) == (objective != "clm"), "the others fail in the tracing"


def test_a_file_that_gives_other_numbers_is_refused(tmp_path):
    task, rows = classified("timm/resnet10t")
    traced = program(tmp_path, task, rows.decoder.modality)
    model = traced.program.module()

    def run(inputs):  # only for a single row something is wrong
        wrong = 1e-2 if len(inputs["image"]) == 1 else 0.0
        return {name: tensor + wrong for name, tensor in model(inputs).items()}

    with pytest.raises(BundleError, match="the export gives other numbers than the bundle: scores"):
        graph.compare(traced, "b", run)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["longer rows", "padding"])
def test_a_file_that_is_wrong_for_longer_or_padded_recordings_is_refused(wrong, tmp_path):
    task, rows = classified("torchaudio/conformer")
    traced = program(tmp_path, task, rows.decoder.modality)
    model = traced.program.module()
    width = traced.samples[0][0]["mask"].shape[1]

    def run(inputs):
        if wrong == "padding":
            return model({**inputs, "mask": torch.ones_like(inputs["mask"])})
        error = 1e-2 if inputs["mask"].shape[1] > width else 0.0
        return {name: tensor + error for name, tensor in model(inputs).items()}

    with pytest.raises(BundleError, match="other numbers"):
        graph.compare(traced, "b", run)


def test_without_the_extra_the_install_line_is_given(tmp_path, monkeypatch):
    task, rows = classified("timm/resnet10t")
    uri = saved(tmp_path, task, rows.decoder.modality)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match="needs onnxruntime, which is not installed: uv pip"):
        export.export_bundle(uri, str(tmp_path / "out"), "onnx", False)


@pytest.mark.slow
def test_the_tokenizer_beside_a_tagger_puts_a_space_before_the_first_word(tmp_path, monkeypatch):
    """Byte-level BPE has other tokens for a word behind a space, as the modality gives each."""
    case = OBJECTIVES["tagging"].build("tagging")
    modality = case.rows.decoder.modality
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=names, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["A text. Another one. Ada went to Rome."] * 4, trainer)
    size = tokenizer.get_vocab_size()
    state = {"tokenizer": tokenizer.to_str(), "vocabulary": size, "specials": [0, 1, 2, 3, 4]}
    modality = Text(modality.options, state)
    task = task_of(
        "transformers/bert", modality.inputs(), "tagging", case.task.objective.state, **SMALL
    )
    uri = saved(tmp_path, task, modality)
    export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    words = [["Another", "one", "."]]
    arrays, _ = modality.decode(pa.table({"text": words}), {"text": "text"})
    count = int(arrays["lengths"][0])
    ids = written.encode(words[0], is_pretokenized=True).ids
    assert ids == arrays["tokens"][0][:count].tolist()
