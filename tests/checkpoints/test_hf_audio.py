"""Folders of wav2vec 2.0, both ways: transformers' own outputs here, and the bundles' outputs in
its own classes.
"""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from toys import furthest, label_state, task_from, task_of, weights
from toys import transformers_model as loaded

from pipeline.checkpoints import bundle, export, exported_classifier, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.contracts import Batch
from pipeline.core.specs import ModalitySpec
from pipeline.modalities.audio import Audio, AudioOptions

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 12,
    "codevector_dim": 16,
    "proj_codevector_dim": 20,
    "final_dropout": 0.0,
}
NORMS = {
    "group": {"feat_extract_norm": "group"},
    "layer": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "'": 7}
"""As wav2vec2-base-960h has them, with fewer letters."""
STATES = {
    "wav2vec2": None,
    "classification": label_state(),
    "multilabel": {"labels": ["a", "b", "c"], "separator": "|", "positives": [1, 1, 1], "rows": 3},
}
"""What each objective's head is fitted to."""
ALPHABET = {
    "labels": ["<blank>", " ", "'", "E", "T"],
    "characters": " 'ET",
    "tokenizer": "",
    "units": "characters",
    "normalization": "upper spaces",
    "convolutions": [],
    "rate": 16000,
}
HEAD = {"groups": 2, "entries": 12, "code_width": 16, "width": 20}
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "conv_channels": 24}


def scattered(model):
    """Biases and norms start as noughts and ones: a mix-up of those would not be seen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def saved(
    ending: str,
    folder,
    norm: str = "group",
    vocabulary=None,
    normalize: bool = True,
    rate: int = 16000,
    **more,
):
    """``Wav2Vec2`` + ending as save_pretrained leaves it, with its feature extractor, and its
    tokenizer where it has one.
    """
    vocabulary = vocabulary or LETTERS
    config = hf.Wav2Vec2Config(**{**CONFIG, **NORMS[norm], "vocab_size": len(vocabulary), **more})
    model = scattered(getattr(hf, f"Wav2Vec2{ending}")(config))
    model.save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor(
        do_normalize=normalize, sampling_rate=rate, return_attention_mask=norm == "layer"
    ).save_pretrained(folder)
    if ending == "ForCTC":
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder


def recordings(folder, seconds=(0.5, 0.31, 0.8), rate: int = 16000) -> list[np.ndarray]:
    """Float samples, as 16-bit WAV files hold them; the files themselves in the folder."""
    rng, out = np.random.default_rng(3), []
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(seconds):
        wave = (0.2 * rng.standard_normal(int(length * rate)) + 0.05).clip(-1, 1)
        soundfile.write(folder / f"{number}.wav", wave, rate, "PCM_16")
        out.append(soundfile.read(folder / f"{number}.wav", dtype="float32")[0])
    return out


def rows(modality, folder) -> Batch:
    """The folder's recordings as the modality makes them."""
    files = sorted(str(path) for path in folder.glob("*.wav"))
    arrays, bad = modality.decode(pa.table({"audio": files}), {"audio": "audio"})
    assert not any(bad)
    return modality.finish(
        Batch(np.arange(len(files)), torch.arange(len(files)) * 7919, modality.collate(arrays))
    )


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "ending", ["Model", "ForPreTraining", "ForCTC", "ForSequenceClassification"]
)
def test_a_folder_gives_transformers_own_states(ending, norm, normalize, tmp_path):
    """From files of sound to the last hidden state, each row as transformers gives it alone."""
    saved(ending, tmp_path / "model", norm, normalize=normalize)
    waves = recordings(tmp_path / "sound")
    start = pretrained.read(f"hf:{tmp_path / 'model'}")
    assert (
        start.arch is not None
        and start.modality is not None
        and start.arch.name == "transformers/wav2vec2"
    )
    backbone = bundle.build_backbone(start.arch, seed=1).eval()
    moved = start.load_into(backbone)
    heads = {
        "Model": set(),
        "ForPreTraining": {"quantizer", "project_hid", "project_q"},
        "ForCTC": {"lm_head"},
        "ForSequenceClassification": {"projector", "classifier"},
    }
    assert not moved.new and {name.split(".")[1] for name in moved.dropped} == heads[ending]
    found = backbone(
        rows(bundle.build_modality(start.modality), tmp_path / "sound"), want=("tokens",)
    )
    model, extractor = (
        hf.AutoModel.from_pretrained(tmp_path / "model").eval(),
        hf.AutoFeatureExtractor.from_pretrained(tmp_path / "model"),
    )
    for row, wave in enumerate(waves):
        want = model(**extractor(wave, sampling_rate=16000, return_tensors="pt")).last_hidden_state[
            0
        ]
        assert int(found.mask[row].sum()) == len(want) and want.std() > 0.1
        assert (found.tokens[row, : len(want)] - want).abs().max() < 1e-5
    assert pretrained.modality_name(f"hf:{tmp_path / 'model'}") == "audio"
    assert (
        start.modality.state == {"features": "wave", "normalize": normalize}
        and start.arch.inputs["rate"] == 16000
    )


def test_rates_are_the_extractors(tmp_path):
    start = pretrained.read(f"hf:{saved('Model', tmp_path, rate=8000)}")
    assert start.modality.options["rate"] == 8000 and start.arch.inputs["rate"] == 8000


def test_a_checkpoint_without_an_embedding_for_masks_gets_one(tmp_path):
    """wav2vec2-base-960h was published so."""
    saved("ForCTC", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if "masked_spec_embed" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    start = pretrained.read(f"hf:{tmp_path}")
    backbone = bundle.build_backbone(start.arch, seed=1)
    assert start.load_into(backbone).new == ("model.masked_spec_embed",)
    other = bundle.build_backbone(
        replace(
            start.arch, options={"config": {**start.arch.options["config"], "mask_time_prob": 0.0}}
        ),
        seed=1,
    )
    assert not start.load_into(other).new, "a model that never hides frames needs none"
    lacking = {name: t for name, t in tensors.items() if "layer_norm.weight" not in name}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match=r"tensors are missing \(model\.feature_"):
        pretrained.read(f"hf:{tmp_path}").load_into(backbone)


def test_files_of_before_torch_2_1(tmp_path):
    saved("ForCTC", tmp_path)
    want = pretrained.read(f"hf:{tmp_path}")
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): t
        for name, t in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    a, b = (bundle.build_backbone(want.arch, seed=seed) for seed in (1, 2))
    want.load_into(a)
    assert (
        not pretrained.read(f"hf:{tmp_path}").load_into(b).new
        and furthest(weights(a), weights(b)) == 0
    )


def edited(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "preprocessor_config.json").unlink(),
            "preprocessor_config.json is missing, which says the rate of the samples; save "
            "the model again",
        ),
        (
            lambda f: edited(
                f / "preprocessor_config.json", feature_extractor_type="Speech2TextFeatureExtractor"
            ),
            r"is not that of a model of samples \(feature_extractor_type Speech2TextFeatureExtractor",
        ),
        (
            lambda f: edited(f / "preprocessor_config.json", sampling_rate=None),
            "sampling_rate None",
        ),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(tmp_path, spoil, message):
    spoil(saved("Model", tmp_path))
    with pytest.raises(BundleError, match=f"^hf:{tmp_path}.*{message}|{message}"):
        pretrained.read(f"hf:{tmp_path}")


def test_a_processors_configuration_tells_the_rate_too(tmp_path):
    """As transformers 5 saves a processor."""
    saved("ForCTC", tmp_path, normalize=False)
    message = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": message}))
    before = pretrained.fingerprint(f"hf:{tmp_path}")
    assert pretrained.read(f"hf:{tmp_path}").modality.options == {
        "rate": 16000,
        "features": "wave",
        "normalize": False,
    }
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"feature_extractor": {**message, "do_normalize": True}})
    )
    assert pretrained.fingerprint(f"hf:{tmp_path}") != before, (
        "recordings are read otherwise: the source is trained anew"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformers/wav2vec2", "audio"),
        ("wavenet/wavenet", "audio"),
        ("torchaudio/conformer", "audio"),
        ("hf-hub:facebook/wav2vec2-base", "audio"),
        ("hf-hub:bert-base-uncased", "text"),
        ("transformers/bert", "text"),
        ("timm/resnet18", "image"),
    ],
)
def test_what_rows_a_name_stands_for(name, kind):
    assert pretrained.modality_name(name) == kind


# ---------------------------------------------------------------- heads of checkpoints


@torch.no_grad()
def test_a_ctc_head_goes_by_the_names_of_its_labels(tmp_path):
    """Its blank and its space under our names, its other special tokens left out; in the order of
    the objective.
    """
    letters = {"T": 0, "E": 1, "|": 2, "<pad>": 3, "'": 4, "<s>": 5, "</s>": 6, "<unk>": 7}
    saved(
        "ForCTC",
        tmp_path / "model",
        vocabulary=letters,
        pad_token_id=3,
        bos_token_id=5,
        eos_token_id=6,
    )
    recordings(tmp_path / "sound")
    start = pretrained.read(f"hf:{tmp_path / 'model'}")
    task, said = task_from(start, "ctc", ALPHABET)
    assert said == "head kept: the same labels, put into their new order"
    batch = rows(bundle.build_modality(start.modality), tmp_path / "sound")
    tokens = task.backbone(batch, want=("tokens",)).tokens
    model = hf.Wav2Vec2ForCTC.from_pretrained(tmp_path / "model").eval()
    assert (
        task.objective.head(tokens) - model.lm_head(tokens)[..., [3, 2, 4, 1, 0]]
    ).abs().max() < 1e-6
    other = {**ALPHABET, "labels": ["<blank>", " ", "'", "e", "t"], "characters": " 'et"}
    partly, said = task_from(start, "ctc", other)
    assert said == (
        "head kept for 3 of 5 labels; the rows of the others are new (labels that only one of both has: 4 names, "
        "e.g. E, T, e, t)"
    )
    shared = partly.objective.head(tokens)[..., :3] - model.lm_head(tokens)[..., [3, 2, 4]]
    assert shared.abs().max() < 1e-6 and not partly.objective.names_taken_over
    assert (
        task_from(start, "ctc", ALPHABET, {"convolutions": 1})[1] == "new head: its options differ"
    )
    assert (
        task_from(start, "wav2vec2", options=HEAD)[1]
        == "new head: the checkpoint holds none of Wav2Vec2ForPreTraining"
    )
    (tmp_path / "model" / "vocab.json").unlink()
    assert (
        task_from(pretrained.read(f"hf:{tmp_path / 'model'}"), "ctc", ALPHABET)[1]
        == "new head: the folder has no vocab.json"
    )
    # Several languages in one
    (tmp_path / "model" / "vocab.json").write_text(json.dumps({"eng": letters}))
    assert (
        "vocab.json does not say what the 8 rows"
        in task_from(pretrained.read(f"hf:{tmp_path / 'model'}"), "ctc", ALPHABET)[1]
    )


def test_pretraining_goes_on_with_the_checkpoints_own_quantiser(tmp_path):
    start = pretrained.read(f"hf:{saved('ForPreTraining', tmp_path)}")
    task, said = task_from(start, "wav2vec2", options=HEAD)
    model = hf.Wav2Vec2ForPreTraining.from_pretrained(tmp_path)
    own = {name: p for name, p in model.state_dict().items() if not name.startswith("wav2vec2.")}
    assert said.startswith("head kept: ") and said.endswith("wav2vec2")
    assert (
        furthest(
            own, {name: t for name, t in weights(task.objective).items() if name != "progress"}
        )
        == 0
    )
    assert (
        task_from(start, "wav2vec2", options={**HEAD, "entries": 13})[1]
        == "new head: its options differ"
    )
    assert (
        task_from(start, "ctc", ALPHABET)[1]
        == "new head: the checkpoint holds none of Wav2Vec2ForCTC"
    )


# ---------------------------------------------------------------- export


def bundled(
    folder, objective: str, state=None, options=None, normalize: bool | None = None, **backbone
):
    """(a task with random weights, its modality, its bundle's place)."""
    modality = Audio(AudioOptions(normalize=normalize), {"features": "wave", "normalize": True})
    task = scattered(
        task_of(
            "transformers/wav2vec2",
            modality.inputs(),
            objective,
            state,
            options=options,
            **{**SIZES, **backbone},
        )
    )
    bundle.save(
        str(folder / "bundle"),
        task,
        ModalitySpec("audio", modality.options.model_dump(), modality.state),
    )
    return task, modality, str(folder / "bundle")


@torch.no_grad()
@pytest.mark.parametrize("normalize", [None, False])
@pytest.mark.parametrize("norm", ["sizes", "group"])
def test_transcripts_are_those_of_the_bundle(norm, normalize, tmp_path):
    """From files to texts by transformers alone: processor, model, greedy decoding."""
    given = {"config": {**CONFIG, **NORMS["group"]}} if norm == "group" else {}
    task, modality, uri = bundled(tmp_path, "ctc", ALPHABET, normalize=normalize, **given)
    said = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert "Wav2Vec2ForCTC with" in said
    waves = recordings(tmp_path / "sound")
    batch = rows(modality, tmp_path / "sound")
    log_probs, ends = task.objective.emissions(task.backbone, batch)
    predicted = task.objective.predict(task.backbone, batch)["prediction"]
    model, processor = (
        loaded("AutoModelForCTC", tmp_path / "out"),
        hf.AutoProcessor.from_pretrained(tmp_path / "out"),
    )
    assert type(processor).__name__ == "Wav2Vec2Processor"
    for row, wave in enumerate(waves):
        logits = model(**processor(wave, sampling_rate=16000, return_tensors="pt")).logits
        assert (
            logits.shape[1] == int(ends[row])
            and (logits[0].log_softmax(-1) - log_probs[row, : int(ends[row])]).abs().max() < 1e-5
        )
        assert " ".join(
            processor.batch_decode(logits.argmax(-1))[0].split()
        ) == task.objective.alphabet.decode(predicted[row].tolist())
    assert model.config.pad_token_id == 0 and model.config.vocab_size == 5
    start = pretrained.read(f"hf:{tmp_path / 'out'}")
    twin, kept = task_from(start, "ctc", ALPHABET)
    assert kept == "head kept: the same labels" and furthest(weights(twin), weights(task)) == 0
    assert start.modality.options["normalize"] == (normalize is None)


@pytest.mark.usefixtures("beam_search")
def test_an_export_says_that_beam_search_is_not_part_of_it(tmp_path):
    """transformers decodes greedily, so its word error rate is another one."""
    _, _, uri = bundled(tmp_path, "ctc", ALPHABET, {"beam": 20})
    note = "beam search and its language model are not part of it"
    assert note in export.export_bundle(uri, str(tmp_path / "whole"), "hugging-face", False)
    assert note not in export.export_bundle(uri, str(tmp_path / "plain"), "hugging-face", True)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["wav2vec2", "classification", "multilabel"])
def test_other_heads_are_transformers_own(objective, tmp_path):
    task, modality, uri = bundled(
        tmp_path, objective, STATES[objective], HEAD if objective == "wav2vec2" else {"norm": False}
    )
    export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    recordings(tmp_path / "sound")
    batch = rows(modality, tmp_path / "sound")
    given = {"input_values": batch["wave"], "attention_mask": batch["mask"].long()}
    if objective == "wav2vec2":
        found = task.backbone(batch, want=("tokens", "latent"))
        codes, _, _ = task.objective.quantizer(found.latent, None, torch.tensor(1.0))
        model = loaded("AutoModelForPreTraining", tmp_path / "out")
        want = model(**given)
        assert (task.objective.project_hid(found.tokens) - want.projected_states)[
            found.mask
        ].abs().max() < 1e-5
        assert (task.objective.project_q(codes) - want.projected_quantized_states)[
            found.mask
        ].abs().max() < 1e-5
        assert (
            model.config.num_codevectors_per_group == 12
            and model.config.mask_time_prob == pytest.approx(0.65)
        )
        twin, said = task_from(pretrained.read(f"hf:{tmp_path / 'out'}"), "wav2vec2", options=HEAD)
        assert said.startswith("head kept") and furthest(weights(twin), weights(task)) == 0
        return
    want = loaded("AutoModelForAudioClassification", tmp_path / "out")(**given).logits
    scores = task.objective.predict(task.backbone, batch)["scores"]
    assert (scores - want).abs().max() < 1e-5 and want.std() > 0.01
    names = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert names == {str(i): name for i, name in enumerate(STATES[objective]["labels"])}


@torch.no_grad()
@pytest.mark.parametrize("objective", ["classification", "multilabel"])
@pytest.mark.parametrize("norm", ["sizes", "group"])
def test_a_classifier_trained_with_defaults_is_written_beside_the_plain_model(
    norm, objective, tmp_path
):
    given = {"config": {**CONFIG, **NORMS["group"]}} if norm == "group" else {}
    task, modality, uri = bundled(tmp_path, objective, STATES[objective], {}, **given)
    assert task.objective.options.norm
    text = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert (
        "no layer norm before the linear layer, so load it with load() of classifier.py in "
        "this folder; compared with the bundle" in text
    )
    waves = recordings(tmp_path / "sound")
    ours = task.objective.predict(task.backbone, rows(modality, tmp_path / "sound"))["scores"]
    model, extractor = (
        exported_classifier.load(tmp_path / "out"),
        hf.AutoFeatureExtractor.from_pretrained(tmp_path / "out"),
    )
    for row, wave in enumerate(waves):
        assert (
            model(extractor(wave, sampling_rate=16000, return_tensors="pt"))[0] - ours[row]
        ).abs().max() < 1e-5
    if norm == "sizes":  # a batch of rows of other lengths too
        found = model(extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt"))
        assert (found - ours).abs().max() < 1e-5 < ours.std()


@torch.no_grad()
def test_the_plain_model_is_written_alone(tmp_path):
    task, modality, uri = bundled(tmp_path, "classification", label_state(), {"norm": True})
    recordings(tmp_path / "sound")
    batch = rows(modality, tmp_path / "sound")
    for only, out in ((True, tmp_path / "a"), (False, tmp_path / "b")):
        if not only:  # a bundle without a head
            bundle.save(uri, task.backbone, bundle.load(uri).manifest.modality)
        assert "Wav2Vec2Model with" in export.export_bundle(uri, str(out), "hugging-face", only)
        found, features = (
            loaded("AutoModel", out)(batch["wave"], attention_mask=batch["mask"].long()),
            task.backbone(batch, want=("tokens",)),
        )
        assert (found.last_hidden_state - features.tokens)[features.mask].abs().max() < 1e-5
        assert hf.AutoFeatureExtractor.from_pretrained(out).sampling_rate == 16000


@pytest.mark.parametrize(
    ("objective", "state", "options", "message"),
    [
        ("ctc", ALPHABET, {"norm": True}, "Train with objective option norm: false"),
        (
            "ctc",
            ALPHABET,
            {"convolutions": 2},
            "the head has convolutions before its linear layer, Wav2Vec2ForCTC of "
            "transformers has none",
        ),
        ("ctc", {**ALPHABET, "units": "subwords"}, {}, "this head's labels are sub-words"),
        (
            "ctc",
            {**ALPHABET, "labels": ["<blank>", " ", "|"], "characters": " |"},
            {},
            r"'\|' is one of this head's labels, .* punctuation: drop to export it",
        ),
    ],
)
def test_a_head_that_transformers_does_not_have_is_refused(
    objective, state, options, message, tmp_path
):
    _, _, uri = bundled(tmp_path, objective, state, options)
    with pytest.raises(BundleError, match=message):
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert not (tmp_path / "out").exists()
