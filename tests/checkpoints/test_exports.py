"""Adapters and sentence encoders open in the libraries that they are for; kinds of export are
registered."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from contract_rows import BACKBONES, OBJECTIVES, pictures
from peft import PeftModel
from toys import (
    SMALL,
    event_rows,
    image_rows,
    label_state,
    sentences,
    take,
    task_of,
    text_modality,
    text_rows,
)

from pipeline import cli
from pipeline.checkpoints import bundle, export
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.core.batch import Batch
from pipeline.core.specs import ModalitySpec, Spec
from pipeline.objectives import ctc
from pipeline.techniques.peft import Lora, LoraOptions

IMAGE = {"channels": 3, "size": 32}


def test_the_command_offers_every_kind():
    assert all(f"{name}:" in cli.EXPORT_KINDS for name in registry.names("export"))
    with pytest.raises(ValueError, match=r"--kind onx: did you mean onnx\?"):
        export.export_bundle("nowhere", "out", "onx", False)


def fine_tuned(folder: Path, name: str, change, **options):
    """A source's bundle, and that of a fine-tune whose weights ``change`` has changed."""
    is_text = name.startswith("transformers")
    rows = text_rows(8, text_modality(name)) if is_text else image_rows(8, size=32, channels=3)
    modality = rows.decoder.modality
    inputs = modality.inputs() if is_text else IMAGE
    sizes = {**SMALL, "hidden": 64} if is_text else {}
    task = task_of(name, inputs, "classification", label_state(), 0, **{**sizes, **options}).eval()
    spec = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    base = str(folder / "base")
    bundle.save(base, copy.deepcopy(task.backbone), spec)
    task = change(task)
    uri = str(folder / "tuned")
    bundle.save(uri, task, spec, parent=base)
    return task.eval(), base, uri, take(rows, range(8))


def by_lora(**options):
    def change(task):
        technique = Lora(LoraOptions(rank=2, **options))
        torch.manual_seed(0)
        wrapped = technique.wrap(task)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return technique.finish(wrapped)

    return change


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers/bert", "transformers/gpt2", "timm/test_resnet"])
def test_peft_opens_an_adapter_on_the_exported_base(name, tmp_path):
    task, base, uri, batch = fine_tuned(tmp_path, name, by_lora())
    said = export.export_bundle(uri, str(tmp_path / "adapter"), "peft", False)
    export.export_bundle(base, str(tmp_path / "hf"), "hugging-face", True)
    if name.startswith("timm"):
        import timm

        plain = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
        inputs = {"x": batch["image"]}
        ours = task.backbone.model(batch["image"])
    else:
        plain = hf.AutoModel.from_pretrained(tmp_path / "hf").eval()
        inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}
        ours = task.backbone(batch, want=("tokens",)).tokens[batch["mask"]]

    def states(model):
        return model(**inputs)

    before = states(plain)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    theirs = states(adapted)
    if not name.startswith("timm"):
        before = before.last_hidden_state[batch["mask"]]
        theirs = theirs.last_hidden_state[batch["mask"]]
    assert (theirs - before).abs().max() > 1e-2, "the adapter changes something"
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    whole = sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())
    alone = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert alone < whole / 2 and "head.safetensors" in said


def test_what_is_no_adapter_is_refused(tmp_path):
    def everything(task):
        with torch.no_grad():
            for parameter in task.backbone.parameters():
                parameter.add_(0.1)
        return task

    _, _, uri, _ = fine_tuned(tmp_path, "transformers/bert", everything)
    with pytest.raises(
        BundleError, match=r"changed by more than an adapter of low rank .*LayerNorm"
    ):
        export.export_bundle(uri, str(tmp_path / "out"), "peft", False)
    found = bundle.load(uri)
    alone = str(tmp_path / "alone")
    bundle.save(alone, found.task(), found.manifest.modality)
    with pytest.raises(BundleError, match="that it was fine-tuned from is needed"):
        export.export_bundle(alone, str(tmp_path / "out"), "peft", False)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("transformers/bert", "mean"),
        ("transformers/distilbert", "first"),
        ("transformers/gpt2", "last"),
    ],
)
def test_sentence_transformers_gives_the_vectors_of_embed(name, pool, tmp_path, capfd):
    library = pytest.importorskip("sentence_transformers")
    task, _, uri, _ = fine_tuned(tmp_path, name, lambda task: task, pool=pool)
    capfd.readouterr()
    export.export_bundle(uri, str(tmp_path / "out"), "sentence-transformers", False)
    printed = "".join(capfd.readouterr())
    assert printed == "", "transformers reported a pooler that is not read as missing"
    texts = sentences(6, seed=3)[0]
    modality = bundle.load(uri).modality()
    rows = text_rows(6, modality, seed=3)
    with torch.no_grad():
        ours = task.backbone(take(rows, range(6))).pooled.numpy()
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert ours.std(0).max() > 1e-2


def test_a_pooler_is_none_of_sentence_transformers(tmp_path):
    _, _, uri, _ = fine_tuned(tmp_path, "transformers/bert", lambda task: task, pool="pooler")
    with pytest.raises(BundleError, match="pool: pooler is not one of sentence-transformers' ways"):
        export.export_bundle(uri, str(tmp_path / "out"), "sentence-transformers", False)


@pytest.mark.parametrize("name", ["transformers/bert", "timm/test_resnet", "events/gru"])
def test_the_kind_that_the_report_offers_works(name, tmp_path):
    if name == "events/gru":
        rows = event_rows(8)
        modality = rows.decoder.modality
        task = task_of(name, modality.inputs(), "classification", label_state())
        uri = str(tmp_path / "tuned")
        spec = ModalitySpec("events", modality.options.model_dump(), modality.state)
        bundle.save(uri, task, spec)
    else:
        _, _, uri, _ = fine_tuned(tmp_path, name, lambda task: task)
    kind = export.usual_kind(uri)
    assert kind == ("bundle" if name == "events/gru" else "hugging-face")
    assert "compared with the bundle" in export.export_bundle(
        uri, str(tmp_path / "out"), kind, False
    )
    found = bundle.load(uri)
    kept = str(tmp_path / "kept")
    bundle.save(kept, found.task(), found.manifest.modality, technique=Spec("side_tuning"))
    assert export.usual_kind(kept) == "bundle" == export.usual_kind(str(tmp_path / "nowhere"))


def tiny(folder, name: str, change=lambda task: task, fit: str = "crop"):
    """As `fine_tuned`, of library hf: bundles of a source and of what it was changed into."""
    make, options = BACKBONES.get(name, (pictures, {"config": VISION}))
    sample = make() if make is not pictures else pictures(fit=fit)
    modality = sample.fitted(name)
    task = task_of(name, modality.inputs(), "classification", label_state(), **options).eval()
    spec = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    bundle.save(str(folder / "base"), copy.deepcopy(task.backbone), spec)
    task = change(task)
    bundle.save(str(folder / "tuned"), task, spec, parent=str(folder / "base"))
    return task.eval(), str(folder / "tuned"), sample


VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 8,
}


@torch.no_grad()
def test_peft_takes_an_adapter_of_any_family(tmp_path):
    task, uri, _ = tiny(tmp_path, "hf/vit", by_lora())
    export.export_bundle(uri, str(tmp_path / "adapter"), "peft", False)
    export.export_bundle(str(tmp_path / "base"), str(tmp_path / "hf"), "hugging-face", True)
    plain = hf.AutoModel.from_pretrained(tmp_path / "hf").eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = plain(pixels).last_hidden_state
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    theirs = adapted(pixels).last_hidden_state
    assert (theirs - before).abs().max() > 1e-2
    ours = task.backbone.model(pixels).last_hidden_state
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_sentence_transformers_takes_any_family(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    task, uri, sample = tiny(tmp_path, "hf/electra")
    export.export_bundle(uri, str(tmp_path / "out"), "sentence-transformers", False)
    modality = bundle.load(uri).modality()
    arrays, _ = modality.decode(sample.table, {"text": "text"})
    count = len(sample.table)
    batch = Batch(np.arange(count), torch.arange(count), modality.collate(arrays))
    with torch.no_grad():
        ours = task.backbone(modality.finish(batch)).pooled.numpy()
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    theirs = model.encode(sample.table["text"].to_pylist())
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert ours.std(0).max() > 1e-2


def test_padded_images_have_no_processor_of_transformers(tmp_path):
    _, uri, _ = tiny(tmp_path, "hf/vit", fit="pad")
    with pytest.raises(BundleError, match=r"padded to squares \(fit: pad\), and no image proc"):
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert export.usual_kind(uri) == "bundle"
    _, uri, _ = tiny(tmp_path / "other", "hf/vit")
    assert export.usual_kind(uri) == "hugging-face"


@pytest.mark.parametrize("kind", ["state-dict", "torch-export", "onnx"])
def test_files_name_no_place_of_this_machine(kind, tmp_path, monkeypatch):
    """Not that of a language model, nor those of the code that was traced."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    conformer = "torchaudio/conformer"
    case = replace(OBJECTIVES["ctc"], backbone=conformer, backbone_options=BACKBONES[conformer][1])
    built = case.build("ctc")
    searched = {"beam": 5, "lm": "/home/alice/secret/characters.arpa"}
    built.task.objective.options = built.task.objective.options.model_copy(update=searched)
    monkeypatch.setattr(ctc, "beam_search_decoder", lambda *_: None)
    modality = built.rows.decoder.modality
    spec = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    uri = str(tmp_path / "b")
    bundle.save(uri, built.task.eval(), spec)
    folder = tmp_path / "out"
    for backbone_only in (False, True):
        name = f"{backbone_only}.safetensors" if kind == "state-dict" else str(backbone_only)
        export.export_bundle(uri, str(folder / name), kind, backbone_only)
    places = (b"/home/alice", str(Path(torch.__file__).parent).encode(), b"/pipeline/checkpoints")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2 or kind == "state-dict"
    for path in files:
        content = path.read_bytes()
        assert not [place for place in places if place in content], path
    if kind == "state-dict":
        described = json.loads((folder / "False_model.json").read_text())
        assert described["objective"]["options"]["lm"] == "characters.arpa"
