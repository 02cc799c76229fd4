"""Folders of any family of transformers, as its own classes write and read them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
import transformers as hf
from contract_rows import HF_SERIES, pictures, recordings, texts, windows
from hf_families import FAMILIES
from toys import (
    image_file,
    label_state,
    make_run,
    packed_rows,
    rows_of,
    take,
    task_of,
    text_modality,
    weights,
)

from pipeline.checkpoints import bundle, export, exported_classifier, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.nn import auto_model
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.models.hf import spectrograms
from pipeline.train import loop

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def folder_of(family: str, place: Path) -> Path:
    """A folder as save_pretrained leaves it: a random model and its processor."""
    rows, given, processor = FAMILIES[family]
    config = auto_model.configuration(family, given, {})
    torch.manual_seed(0)
    model = auto_model.model_class(config)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.requires_grad:
                continue
            p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(place)
    if rows == "text":
        write_tokenizer(place)
    elif rows == "image":
        write_image_processor(place)
    elif rows == "audio":
        kind = auto_model.extractor_class(config, None)
        kind(**processor).save_pretrained(place)
    return place


def write_tokenizer(place: Path) -> None:
    (place / "tokenizer.json").write_text(tokenizer())
    specials = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{role}_token": f"[{role.upper()}]" for role in specials}
    (place / "special_tokens_map.json").write_text(json.dumps(names))


@cache
def tokenizer() -> str:
    return text_modality().state["tokenizer"]


def write_image_processor(place: Path, **more: Any) -> None:
    made = hf.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=3, **more
    )
    made.save_pretrained(place)


def loaded(place: Path):
    """The backbone with the folder's weights, and the checkpoint."""
    start = pretrained.read(f"hf:{place}")
    backbone = bundle.build_backbone(start.arch, seed=3)
    moved = start.load_into(backbone)
    assert not [name for name in moved.new if "pooler." not in name]
    return backbone.eval(), start


def batch_of(start) -> Batch:
    """Four rows of random content, padded ones among them."""
    rng = np.random.default_rng(0)
    modality = bundle.build_modality(start.modality)
    made = modality.random_rows(4, rng)
    return modality.finish(Batch(np.arange(4), torch.arange(4), made))


@torch.no_grad()
def theirs(family: str, place: Path, batch: Batch, row: int, has_types: bool) -> Any:
    """What transformers' own classes, opened from the folder, give for one row alone."""
    kind = auto_model.model_class(auto_model.configuration(family, FAMILIES[family].config, {}))
    model = kind.from_pretrained(place).eval()
    if "tokens" in batch.data:
        real = batch["mask"][row]
        words: Any = {"input_ids": batch["tokens"][row][real][None]}
        if has_types and "types" in batch.data:
            words["token_type_ids"] = batch["types"][row][real][None].long()
    elif "image" in batch.data:
        words = {"pixel_values": batch["image"][row : row + 1]}
    elif "series" in batch.data:
        observed = "past_observed_mask" if family == "patchtst" else "observed_mask"
        words = {
            "past_values": batch["series"][row : row + 1],
            observed: batch["known"][row : row + 1],
        }
    else:
        wave = batch["wave"][row][batch["mask"][row]].numpy()
        reader = hf.AutoFeatureExtractor.from_pretrained(place)
        words = dict(reader(wave, sampling_rate=16000, return_tensors="pt"))
        words.pop("attention_mask", None)
    if family in ("bart", "whisper"):
        model = model.get_encoder()
    return model(**words)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read_as_transformers_reads_it(family, tmp_path):
    """The same states of the same row, padded or not, and layers cover every parameter."""
    place = folder_of(family, tmp_path)
    backbone, start = loaded(place)
    assert start.arch.name == f"hf/{family}" and start.modality.name == FAMILIES[family].rows
    layers = backbone.layers()
    named = [name for names in layers.values() for name in names]
    assert sorted(named) == sorted(name for name, _ in backbone.named_parameters())
    assert sum(name.startswith("block") for name in layers) >= (1 if family == "albert" else 2)
    batch, row = batch_of(start), 1
    with torch.no_grad():
        found = backbone(batch)
    expected = theirs(family, place, batch, row, getattr(backbone, "has_types", False))
    if found.tokens is None:
        states = expected.last_hidden_state
        pooled = states.mean((2, 3)) if expected.get("pooler_output") is None else None
        pooled = expected.pooler_output.flatten(1) if pooled is None else pooled
        torch.testing.assert_close(found.pooled[row], pooled[0], rtol=1e-4, atol=1e-5)
        return
    ours, states = found.tokens[row], expected.last_hidden_state[0]
    if states.dim() == 3:  # of each channel at a patch
        states = torch.cat(list(states), 1)
    if found.mask is not None:
        real = int(found.mask[row].sum())
        ours, states = ours[:real], states[:real]
    torch.testing.assert_close(ours, states, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- trained, saved, written back


def unnamed_windows():
    """The contract's series as lists of steps, as a checkpoint reads whose channels have no names."""
    sample = windows()
    rows = []
    for row in sample.table["signal"].to_pylist():
        steps = max(len(numbers) for numbers in row.values() if numbers is not None)
        channels = [[np.nan] * steps if numbers is None else numbers for numbers in row.values()]
        rows.append(np.array(channels).T.tolist())
    return replace(sample, table=sample.table.set_column(0, "signal", pa.array(rows)))


SAMPLES = {"text": texts, "image": pictures, "audio": recordings(), "series": unnamed_windows}
NO_CLASS_ALONE = ("bart", "whisper")
"""Encoders that transformers opens with their decoders only."""


def rows_for(start):
    """Rows with three classes, read as the checkpoint says."""
    modality, sample = bundle.build_modality(start.modality), SAMPLES[start.modality.name]()
    arrays, bad = modality.decode(sample.table, sample.columns)
    assert not any(bad), bad
    labels = {"label": np.arange(len(sample.table)) % 3}
    return rows_of(modality, {**arrays, **labels}, "classification", label_state())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_saved_and_written_back(family, tmp_path):
    """Full, linear_probe and LoRA move what they should; a bundle and a folder give the same."""
    start = pretrained.read(f"hf:{folder_of(family, tmp_path / 'folder')}")
    rows = rows_for(start)
    batch = take(rows, np.arange(4))
    for name in ("full", "linear_probe", "lora"):
        arch = start.arch
        task = bundle.build_task(arch, ObjectiveSpec("classification", {}, label_state()), 0)
        start.load_into(task.backbone)
        kind = registry.get("technique", name)
        technique = kind(kind.options_class())
        task = technique.wrap(task)
        before = weights(task.backbone)
        run = make_run(rows, task, steps=2, technique=technique, global_batch=4, lr=1e-2)
        loop.fit(run)
        after = weights(task.backbone)
        moved = {key for key in after if not torch.equal(before[key], after[key])}
        if name == "linear_probe":
            assert not moved
        elif name == "lora":
            assert moved and all("lora_" in key for key in moved)
            task = technique.finish(task)
        else:
            assert len(moved) > len(after) // 2
        task.eval()
        with torch.no_grad():
            scores = task.objective.predict(task.backbone, batch)["scores"]
        place = str(tmp_path / f"{name}-bundle")
        bundle.save(place, task, start.modality, columns={"label": "label"})
        again = bundle.load(place).task()
        with torch.no_grad():
            found = again.objective.predict(again.backbone, batch)["scores"]
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-5)
    if family in NO_CLASS_ALONE:
        with pytest.raises(BundleError, match="no class"):
            export.export_bundle(place, str(tmp_path / "out"), "hugging-face", False)
        return
    for alone in (True, False):
        out = str(tmp_path / f"out-{alone}")
        text = export.export_bundle(place, out, "hugging-face", alone)
        assert "largest difference" in text
    again = pretrained.read(f"hf:{tmp_path / 'out-True'}")
    assert again.arch.name == start.arch.name and again.modality.name == start.modality.name
    own = bundle.load(place).backbone_tensors()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in own.items())


# ---------------------------------------------------------------- language models

MASKED_LM = ("albert", "camembert", "deberta", "deberta-v2", "electra", "modernbert", "mpnet")
MASKED_LM += ("nomic_bert", "roformer", "xlm-roberta")
CAUSAL_LM = ("gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "opt", "phi3")
CAUSAL_LM += ("qwen2", "qwen3")
QUICK = ("modernbert", "qwen3")
"""One of each kind; both have sliding windows or several heads a key."""


def language_model(family: str, place: Path) -> Any:
    """A folder of transformers' class of the family with its language-model head, and the model."""
    config = auto_model.configuration(family, FAMILIES[family].config, {})
    kind: Any = hf.AutoModelForMaskedLM if family in MASKED_LM else hf.AutoModelForCausalLM
    torch.manual_seed(1)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(place)
    write_tokenizer(place)
    return kind.from_pretrained(place).eval()


def packed_batch(start) -> tuple[Batch, list[tuple[int, slice]]]:
    """Packed rows, and the place (row, slice) of each document's part of a row."""
    modality = bundle.build_modality(ModalitySpec("text", {"length": 32}, start.modality.state))
    rows = take(packed_rows(12, modality), np.arange(4))
    places = []
    for i, row in enumerate(rows["segments"].tolist()):
        for number in sorted(set(row) - {0}):
            places.append((i, slice(row.index(number), row.index(number) + row.count(number))))
    return rows, places


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
        for family in MASKED_LM + CAUSAL_LM
    ],
)
def test_a_language_model_is_trained_further(family, tmp_path):
    """Its own head gives transformers' loss; documents of a packed row are as each alone; a target
    starts from the bundle.
    """
    model = language_model(family, tmp_path / "folder")
    start = pretrained.read(f"hf:{tmp_path / 'folder'}")
    objective = "mlm" if family in MASKED_LM else "clm"
    task = bundle.build_task(start.arch, ObjectiveSpec(objective, {}, {}), 0).eval()
    start.load_into(task.backbone)
    is_tied = model.config.tie_word_embeddings
    tied = "no head to carry: the output is the embedding"
    own = f"head kept: the checkpoint's own for {objective}"
    assert start.load_head_into(task) == (tied if objective == "clm" and is_tied else own)

    # padded rows: the loss of transformers' class
    batch = batch_of(start)
    batch = Batch(batch.rows, batch.keys, {name: batch[name] for name in ("tokens", "mask")})
    tokens, labels = batch["tokens"], torch.where(batch["mask"], batch["tokens"], -100)
    if objective == "mlm":
        places, valid, tokens = task.objective.chosen_positions(batch)
        chosen = torch.zeros_like(batch["mask"]).scatter(1, places, valid)
        labels = torch.where(chosen, labels, -100)
        assert 4 in tokens[chosen], "the tokenizer's own mask"
    with torch.no_grad():
        want = model(input_ids=tokens, attention_mask=batch["mask"].long(), labels=labels).loss
        total, count, _ = task(batch)
    torch.testing.assert_close(total / count, want, rtol=1e-4, atol=1e-5)

    # packed rows: the states of each document alone
    packed, documents = packed_batch(start)
    with torch.no_grad():
        states = task.backbone(packed).tokens
        for row, here in documents:
            alone = packed["tokens"][row : row + 1, here]
            mask = torch.ones_like(alone, dtype=torch.bool)
            single = task.backbone(Batch(row, row, {"tokens": alone, "mask": mask})).tokens
            torch.testing.assert_close(states[row : row + 1, here], single, rtol=0, atol=1e-5)
    assert len(documents) > 5 and not states[packed["segments"] == 0].any()

    # training reaches every parameter, and a bundle keeps the loss
    task.train()
    total, count, _ = task(packed)
    total.backward()
    for name, p in task.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name
    with torch.no_grad():
        for p in task.parameters():
            p.sub_(1e-3 * p.grad)
        before = task.eval()(packed)[0]
    bundle.save(str(tmp_path / "b"), task, start.modality)
    with torch.no_grad():
        assert torch.equal(bundle.load(str(tmp_path / "b")).task().eval()(packed)[0], before)

    # a target starts from there
    start = pretrained.read(f"bundle:{tmp_path / 'b'}")
    rows = rows_for(start)
    target = bundle.build_task(start.arch, ObjectiveSpec("classification", {}, label_state()), 0)
    start.load_into(target.backbone)
    first = weights(target.backbone)
    assert all(torch.equal(first[name], p) for name, p in weights(task.backbone).items())
    loop.fit(make_run(rows, target, steps=2, global_batch=4, lr=1e-2))
    moved = [
        name for name, p in weights(target.backbone).items() if not torch.equal(p, first[name])
    ]
    assert len(moved) > len(first) // 2


@pytest.mark.parametrize(
    ("family", "kind", "objective", "reason"),
    [
        ("llama", hf.LlamaModel, "clm", "holds no language-model head"),
        ("t5", hf.T5EncoderModel, "mlm", "holds no language-model head"),
        ("eurobert", hf.EuroBertForMaskedLM, "mlm", "EuroBertForMaskedLM has another head than"),
    ],
)
def test_a_new_language_model_head_is_tied_to_the_embedding(
    family, kind, objective, reason, tmp_path
):
    config = auto_model.configuration(family, FAMILIES[family].config, {})
    kind(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    start = pretrained.read(f"hf:{tmp_path}")
    task = bundle.build_task(start.arch, ObjectiveSpec(objective, {}, {}), 0)
    assert reason in start.load_head_into(task)
    embedding = task.backbone.embedding()
    hidden = torch.randn(2, 3, task.backbone.token_dim)
    found = task.objective._scores(task.backbone, hidden)
    last = hidden if objective == "clm" else task.objective.transform(hidden)
    torch.testing.assert_close(found, last @ embedding.weight.T)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "llama", "opt"])
def test_a_text_is_continued_as_transformers_does(family, tmp_path):
    """Beyond a sliding window, from rows of several lengths."""
    model = language_model(family, tmp_path)
    start = pretrained.read(f"hf:{tmp_path}")
    task = bundle.build_task(start.arch, ObjectiveSpec("clm", {"generate": 10}, {}), 0).eval()
    start.load_into(task.backbone)
    start.load_head_into(task)
    batch = batch_of(start)
    # the embedding has more rows than the tokenizer has tokens
    absent = list(range(start.arch.inputs["vocabulary"], 400))
    found = task.objective.predict(task.backbone, batch)["generated"].tolist()
    for i, row in enumerate(found):
        prompt = batch["tokens"][i][batch["mask"][i]][:-1]  # without its end
        want = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=10,
            do_sample=False,
            suppress_tokens=absent,
            eos_token_id=3,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        want = want[: want.index(3)] if 3 in want else want
        assert row == want + [-1] * (10 - len(want))
    assert len({tuple(row) for row in found}) > 1


# ---------------------------------------------------------------- heads, towers, processors


def labelled(kind: Any, family: str, place: Path) -> Any:
    """A folder of a class with a head for three labels."""
    config = auto_model.configuration(family, FAMILIES[family].config, {})
    if kind is not hf.ElectraForQuestionAnswering:
        config.id2label = {0: "low", 1: "middle", 2: "high"}
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(place)
    (write_tokenizer if FAMILIES[family].rows == "text" else write_image_processor)(place)
    return model


@pytest.mark.parametrize(
    ("kind", "family", "objective"),
    [
        (hf.ViTForImageClassification, "vit", "classification"),
        (hf.ConvNextForImageClassification, "convnext", "classification"),
        (hf.Qwen2ForTokenClassification, "qwen2", "tagging"),
        (hf.ElectraForQuestionAnswering, "electra", "qa"),
    ],
)
@torch.no_grad()
def test_a_linear_head_is_kept_where_it_gives_the_scores(kind, family, objective, tmp_path):
    model = labelled(kind, family, tmp_path)
    backbone, start = loaded(tmp_path)
    assert set(start.heads) == {objective}
    assert start.labels == (("low", "middle", "high") if objective != "qa" else None)
    batch = batch_of(start)
    features = backbone(batch)
    read = features.pooled if objective == "classification" else features.tokens
    head = start.heads[objective]
    scores = read @ head["head.weight"].T + head["head.bias"]
    given = model(**backbone.model_inputs(batch))
    expected = (
        given.logits
        if objective != "qa"
        else torch.stack([given.start_logits, given.end_logits], -1)
    )
    real = features.mask if features.mask is not None and objective != "classification" else ...
    torch.testing.assert_close(scores[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "family", "options"),
    [
        (hf.PatchTSTForClassification, "patchtst", {"num_targets": 3}),
        pytest.param(
            hf.PatchTSTForRegression, "patchtst", {"use_cls_token": True}, marks=pytest.mark.slow
        ),
        pytest.param(
            hf.PatchTSMixerForTimeSeriesClassification,
            "patchtsmixer",
            {"num_targets": 3, "scaling": None, "head_aggregation": "use_last"},
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_heads_of_series_give_what_transformers_gives(kind, family, options, tmp_path):
    """Classes by their names in another order; numbers in their unit, whatever that of the rows."""
    config = auto_model.configuration(family, {**FAMILIES[family].config, "num_targets": 1}, {})
    config.update({**options, "id2label": {0: "low", 1: "middle", 2: "high"}})
    torch.manual_seed(1)
    model = kind(config).eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(tmp_path)
    start = pretrained.read(f"hf:{tmp_path}")
    batch = batch_of(start)
    if kind is hf.PatchTSTForRegression:
        spec = ObjectiveSpec(
            "regression", {"norm": False}, {"mean": 7.0, "std": 3.0, "labels": ["speed"]}
        )
    else:
        names = ["high", "low", "middle"]
        spec = ObjectiveSpec("classification", {"norm": False}, {"values": names, "labels": names})
    task = bundle.build_task(start.arch, spec, 0).eval()
    start.load_into(task.backbone)
    assert start.load_head_into(task).startswith("head kept")
    given = model(**task.backbone.model_inputs(batch))
    if spec.name == "regression":
        expected = given.regression_outputs
    else:
        scores = given["prediction_logits" if family == "patchtst" else "prediction_outputs"]
        expected = scores[:, [2, 0, 1]]
    found = task.objective.logits(task.backbone, batch)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_head_of_series_that_scales_its_states_is_new(tmp_path):
    """PatchTSMixer's, where a row's level and amplitude go into the states before the head."""
    config = auto_model.configuration("patchtsmixer", FAMILIES["patchtsmixer"].config, {})
    config.update({"num_targets": 3, "scaling": "std", "head_aggregation": "avg_pool"})
    hf.PatchTSMixerForTimeSeriesClassification(config).save_pretrained(tmp_path)
    start = pretrained.read(f"hf:{tmp_path}")
    assert not start.heads and "no linear layer" in start.no_head_reasons["classification"]


def test_a_head_with_more_than_a_linear_layer_is_new(tmp_path):
    labelled(hf.ElectraForSequenceClassification, "electra", tmp_path)
    start = pretrained.read(f"hf:{tmp_path}")
    assert not start.heads and "no linear layer" in start.no_head_reasons["classification"]


@torch.no_grad()
def test_the_networks_of_clip_are_told_apart(tmp_path):
    """Its images by default, its texts where the job says so; each as in the whole model."""
    config = hf.CLIPConfig(
        vision_config=FAMILIES["clip_vision_model"].config,
        text_config=FAMILIES["clip_text_model"].config,
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = hf.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    write_image_processor(tmp_path)
    for wanted, name in ((None, "clip_vision_model"), ("text", "clip_text_model")):
        start = pretrained.read(f"hf:{tmp_path}", modality=wanted)
        assert start.arch.name == f"hf/{name}"
        backbone = bundle.build_backbone(start.arch, seed=2)
        start.load_into(backbone)
        batch = batch_of(start)
        words = backbone.eval().model_inputs(batch)
        network = model.vision_model if wanted is None else model.text_model
        expected = network(**words).pooler_output
        torch.testing.assert_close(backbone(batch).pooled, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BundleError, match="networks of image, text, none of audio"):
        pretrained.read(f"hf:{tmp_path}", modality="audio")


def edited(place: Path, **values: Any) -> None:
    path = place / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_images_are_read_as_the_processor_says(tmp_path):
    place = folder_of("vit", tmp_path)
    start = pretrained.read(f"hf:{place}")
    assert start.modality.options == {
        "size": 32,
        "channels": 3,
        "fit": "squash",
        "interpolation": "bicubic",
    }
    assert start.modality.state == {"mean": MEAN, "std": STD}
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    edited(place, size={"shortest_edge": 40}, resample=2, **crop)
    cropped = pretrained.read(f"hf:{place}").modality.options
    assert (cropped["fit"], cropped["crop_share"], cropped["interpolation"]) == (
        "crop",
        0.8,
        "bilinear",
    )
    edited(place, size={"height": 40, "width": 40}, **crop)  # DeiT's
    squashed = pretrained.read(f"hf:{place}").modality.options
    assert (squashed["fit"], squashed["crop_share"]) == ("squash_crop", 0.8)
    edited(place, size={"height": 32, "width": 32}, **crop)  # nothing is cut away
    assert pretrained.read(f"hf:{place}").modality.options["fit"] == "squash"
    for crops in (False, True):
        edited(place, do_center_crop=crops, size={"height": 32, "width": 48})
        with pytest.raises(BundleError, match="images are squares of 8 to 4096 pixels a side"):
            pretrained.read(f"hf:{place}")


@pytest.mark.parametrize("kind", ["DeiTImageProcessor", "ViTImageProcessor"])
@pytest.mark.parametrize("resized", [{"height": 40, "width": 40}, {"shortest_edge": 40}])
def test_pixels_are_those_of_the_image_processor(kind, resized, tmp_path):
    """Of a picture that is no square: whether its aspect is kept makes a difference.

    Its sides are resized to whole pixels, since a part of one is rounded here and cut off there.
    """
    place = folder_of("vit", tmp_path)
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    edited(place, image_processor_type=kind, size=resized, resample=2, **crop)
    processor = hf.AutoImageProcessor.from_pretrained(place)
    modality = bundle.build_modality(pretrained.read(f"hf:{place}").modality)
    y, x = np.mgrid[0:300, 0:450]
    levels = np.stack([y * 0.8, x * 0.5, (x + y) * 0.3], 2).astype(np.uint8)
    theirs = processor(PIL.Image.fromarray(levels), return_tensors="pt")["pixel_values"][0]
    arrays, _ = modality.decode(pa.table({"image": [image_file(levels)]}), {"image": "image"})
    batch = Batch(np.arange(1), torch.arange(1), modality.collate(arrays))
    ours = modality.finish(batch)["image"][0]
    assert (ours - theirs).abs().max() * min(STD) * 255 <= 2


@pytest.mark.parametrize(
    ("channels", "fit", "mode"),
    [
        (3, "squash", "P"),
        (3, "squash_crop", "RGBA"),
        (3, "crop", "P"),
        (1, "crop", "L"),
    ],
)
def test_the_exported_processor_reads_pictures_of_other_modes(channels, fit, mode, tmp_path):
    """A picture with a palette has indices in place of levels."""
    modality = pictures(fit=fit, channels=channels).fitted("hf/vit")
    config = {**FAMILIES["vit"].config, "num_channels": channels}
    arch = Architecture("hf/vit", {"config": config}, modality.inputs())
    task = bundle.build_task(arch, ObjectiveSpec("classification", {}, label_state()), 0)
    spec = ModalitySpec("image", modality.options.model_dump(), modality.state)
    bundle.save(str(tmp_path / "b"), task, spec)
    out = tmp_path / "out"
    said = export.export_bundle(str(tmp_path / "b"), str(out), "hugging-face", False)
    assert ("reads grey images of 8 bits" in said) == (channels == 1)
    levels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(levels).convert(mode)
    plain = picture.convert("L" if channels == 1 else "RGB")
    processor = hf.AutoImageProcessor.from_pretrained(out)
    found = processor(picture, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, channels, 32, 32)
    assert torch.equal(found, processor(plain, return_tensors="pt")["pixel_values"])


def test_no_code_or_size_from_outside_is_taken(tmp_path):
    place = folder_of("vit", tmp_path)
    config = json.loads((place / "config.json").read_text())
    for wrong, message in (
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: the model is computed by other"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is beyond every model"),
        ({"hidden_size": {"a": "b; c"}}, "'b; c' is no plain word"),
    ):
        (place / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(BundleError, match=message):
            pretrained.read(f"hf:{place}")


def test_older_image_processors_are_read_as_transformers_reads_them(tmp_path):
    place = folder_of("convnext", tmp_path)
    edited(place, size={"shortest_edge": 224}, image_processor_type="ConvNextImageProcessor")
    options = pretrained.read(f"hf:{place}").modality.options
    assert (options["fit"], options["crop_share"]) == ("crop", 224 / 256)
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    for resized in (235, 236, 248, 256):
        edited(place, size={"shortest_edge": resized}, **crop)
        share = pretrained.read(f"hf:{place}").modality.options["crop_share"]
        assert int(224 / share) == resized
    for wrong in ({"rescale_factor": 1 / 127.5}, {"rescale_offset": True}):
        edited(place, rescale_factor=1 / 255, rescale_offset=False)
        edited(place, **wrong)
        with pytest.raises(BundleError, match="levels of pixels are divided by 255 here"):
            pretrained.read(f"hf:{place}")


def test_series_are_standardised_again_as_they_were(tmp_path):
    """transformers has no processor for series; the folder says what it would."""
    modality = windows().fitted("hf/patchtst")
    task = task_of(
        "hf/patchtst", modality.inputs(), "classification", label_state(), config=HF_SERIES
    )
    spec = ModalitySpec("series", {"length": 32, "cut": "first", "missing": "last"}, modality.state)
    bundle.save(str(tmp_path / "b"), task, spec)
    export.export_bundle(str(tmp_path / "b"), str(tmp_path / "out"), "hugging-face", False)
    assert pretrained.read(f"hf:{tmp_path / 'out'}").modality == spec
    edited(tmp_path / "out", mean=[0.0])
    with pytest.raises(
        BundleError, match=r"has mean \[0\.0\], std .*; each must have 3 values, one for each"
    ):
        pretrained.read(f"hf:{tmp_path / 'out'}")


@pytest.mark.parametrize("family", NO_CLASS_ALONE)
def test_an_encoder_without_a_class_is_written_as_plain_tensors(family, tmp_path):
    start = pretrained.read(f"hf:{folder_of(family, tmp_path / 'folder')}")
    task = bundle.build_task(start.arch, ObjectiveSpec("classification", {}, label_state()), 0)
    uri = str(tmp_path / "b")
    bundle.save(uri, task, start.modality)
    with pytest.raises(BundleError, match="no class for the encoder of"):
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert export.usual_kind(uri) == "bundle"
    said = export.export_bundle(uri, str(tmp_path / "w.safetensors"), "state-dict", False)
    assert "w_model.json beside it" in said and not (tmp_path / "w_classifier.py").exists()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hugging-face", "state-dict"])
def test_images_of_another_size_are_classified_by_the_written_code(kind, tmp_path):
    """The classifier is given images alone, and stretches the positions itself."""
    modality = pictures(48, crop_share=0.95).fitted("hf/vit")
    config = FAMILIES["vit"].config
    arch = Architecture("hf/vit", {"config": config}, modality.inputs())
    task = bundle.build_task(arch, ObjectiveSpec("classification", {}, label_state()), 0).eval()
    spec = ModalitySpec("image", modality.options.model_dump(), modality.state)
    bundle.save(str(tmp_path / "b"), task, spec)
    out = tmp_path / ("out" if kind == "hugging-face" else "w.safetensors")
    export.export_bundle(str(tmp_path / "b"), str(out), kind, False)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batch = Batch(np.arange(2), torch.arange(2), {"image": pixels})
    ours = task.objective.logits(task.backbone, batch)
    torch.testing.assert_close(exported_classifier.load(out)(pixels), ours, rtol=1e-4, atol=1e-5)
    if kind == "hugging-face":
        processor = json.loads((out / "preprocessor_config.json").read_text())
        assert processor["size"] == {"shortest_edge": 50}, "rounded down, as the modality does"


@pytest.mark.parametrize(
    ("family", "inputs", "message"),
    [
        ("whisper", {"features": 9}, "hf/whisper reads recordings .*; these rows are 9"),
        ("bert", {"features": 9}, "hf/bert reads texts; these rows are 9"),
        ("bert", {"features": "wave", "rate": 16000}, "hf/bert reads texts; these rows are wave"),
    ],
)
def test_rows_that_a_family_cannot_read_are_reported(family, inputs, message):
    """Also where the longest recording is asked for before the backbone is built."""
    arch = Architecture(f"hf/{family}", {}, inputs)
    assert bundle.largest_options(arch) == {}
    with pytest.raises(ValueError, match=message):
        bundle.build_backbone(arch)


@pytest.mark.parametrize(
    ("family", "seconds"), [("audio-spectrogram-transformer", 1.28), ("whisper", 1.0)]
)
def test_a_recording_that_the_extractor_would_cut_is_refused(family, seconds):
    """Both extractors cut in silence."""
    found = FAMILIES[family]
    config = auto_model.configuration(family, found.config, {})
    kind = auto_model.extractor_class(config, None)
    extractor = kind(**found.processor)
    assert auto_model.longest_seconds(extractor) == seconds
    name = auto_model.model_class(config).main_input_name
    wave = torch.randn(2, round(16000 * seconds) + 1)
    mask = torch.ones_like(wave, dtype=torch.bool)
    mask[:, -1] = False
    spectrograms(extractor, name, wave, mask)
    mask[1, -1] = True
    with pytest.raises(ValueError, match=f"cuts recordings after {seconds:g} s"):
        spectrograms(extractor, name, wave, mask)
