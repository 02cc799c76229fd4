"""Existing checkpoints: the same numbers as the library that wrote them, names with their wrappers off, and no code is run."""

import json
import os
import pickle
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from toys import image_rows, label_state, sentences, take, task_of

from pipeline import bundle, starts, storage
from pipeline.bundle import BundleError
from pipeline.contracts import Batch
from pipeline.modalities.text import train_tokenizer

INPUTS = {"channels": 3, "size": 32}


@pytest.fixture(scope="module")
def task():
    return task_of("timm/test_resnet", INPUTS, "classification", label_state(), seed=4).eval()


@pytest.fixture(scope="module")
def plain(task):
    """The weights as timm itself names them, with its classifier."""
    tensors = {name.removeprefix("model."): t.clone() for name, t in task.backbone.state_dict().items()}
    return {**tensors, "fc.weight": torch.randn(10, 96), "fc.bias": torch.randn(10)}


def write(tensors, path) -> str:
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return f"file:{path}"


def loads(text: str, task, architecture="timm/test_resnet") -> bundle.Transfer:
    """The checkpoint on a fresh backbone gives what the task's backbone gives."""
    start = starts.read(text, architecture)
    twin = bundle.build_backbone(task.backbone.arch, seed=99).eval()
    moved = bundle.transfer(twin, start.tensors, start.origin, start.drop)
    batch = take(image_rows(3, size=32, channels=3), np.arange(3))
    with torch.no_grad():
        assert torch.equal(twin(batch).pooled, task.backbone(batch).pooled)
    return moved


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.model.", "_orig_mod.", "module._orig_mod.", "model.backbone.",
                                    "_orig_mod.module.", "backbone.model."])
def test_a_state_dict_with_its_wrappers_prefixes(task, plain, tmp_path, prefix, suffix):
    """DDP, torch.compile, Lightning and others' backbones, in any order."""
    moved = loads(write({prefix + name: t for name, t in plain.items()}, tmp_path / f"w{suffix}"), task)
    assert set(moved.dropped) == {"model.fc.weight", "model.fc.bias"} and not moved.new


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "model_state_dict"])
def test_a_training_checkpoint_holds_a_state_dict(task, plain, tmp_path, key):
    path = tmp_path / "c.pt"
    torch.save({key: {f"module.{n}": t for n, t in plain.items()}, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    loads(f"file:{path}", task)


def test_our_own_weights_are_a_file_too(task, tmp_path):
    """A bundle's safetensors, or the state dict of a task: the head is left, the backbone loads."""
    loads(write(dict(task.state_dict()), tmp_path / "task.pt"), task)
    modality = {"name": "image", "options": {"size": 32}, "state": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    bundle.save(str(tmp_path / "b"), task, modality)
    moved = loads(f"file:{tmp_path / 'b' / 'weights.safetensors'}", task)
    assert not moved.dropped
    start = starts.read(f"bundle:{tmp_path / 'b'}")
    assert start.arch == task.backbone.arch and start.modality == modality and start.bundle is not None and start.drop == ()
    loads(f"bundle:{tmp_path / 'b'}", task)


def test_tensors_without_a_place_are_refused_by_name(task, plain, tmp_path):
    start = starts.read(write({**plain, "surprise.weight": torch.zeros(1)}, tmp_path / "w.pt"), "timm/test_resnet")
    with pytest.raises(BundleError, match=r"1 tensors have no place \(model\.surprise\.weight\)"):
        bundle.transfer(bundle.build_backbone(task.backbone.arch), start.tensors, start.origin, start.drop)


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
        with pytest.raises(BundleError, match="not a safetensors file or state dict that can be opened without running code"):
            starts.read(f"file:{path}", "timm/test_resnet")
        assert not mark.exists()
    torch.save(torch.nn.Linear(2, 2), path)  # a whole module is code too
    with pytest.raises(BundleError, match="without running code"):
        starts.read(f"file:{path}", "timm/test_resnet")


def test_files_that_are_no_weights_are_refused(tmp_path):
    for name, data in (("a.pt", b"hello"), ("a.safetensors", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError, match=f"{name}: not a safetensors file"):
            starts.read(f"file:{tmp_path / name}", "timm/test_resnet")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(BundleError, match="the file holds no state dict"):
        starts.read(f"file:{tmp_path / 'mixed.pt'}", "timm/test_resnet")
    with pytest.raises(storage.StorageError, match=r"gone\.pt"):
        starts.read(f"file:{tmp_path / 'gone.pt'}", "timm/test_resnet")
    with pytest.raises(BundleError, match="a checkpoint is named bundle:URI, file:PATH, hf:FOLDER, hf-hub:NAME or timm-hub:NAME"):
        starts.read("resnet18")


def test_an_input_is_described_by_timm():
    arch, modality = starts.described("timm/resnet18", {"drop_rate": 0.1})
    assert arch == {"name": "timm/resnet18", "options": {"drop_rate": 0.1}, "inputs": {"channels": 3, "size": 224}}
    assert modality["options"] == {"size": 224, "channels": 3} and modality["state"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(BundleError, match="a weights file does not tell its input"):
        starts.described("transformers/bert", {})


def test_the_hub_without_a_network_fails_at_once_with_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    with pytest.raises(BundleError, match=r"timm-hub:resnet10t: the weights cannot be had from the hub .* give backbone timm/resnet10t with init: file:PATH"):
        starts.read("timm-hub:resnet10t")
    assert time.monotonic() - began < 10
    with pytest.raises(BundleError, match="timm-hub:no_such_model: "):
        starts.read("timm-hub:no_such_model")


# ---------------------------------------------------------------- Hugging Face folders

def tokenizer_of(family: str) -> Tokenizer:
    """BERT's specials stand in a trained vocabulary; GPT-2 has <|endoftext|> alone."""
    texts = sentences(100)[0]
    if family == "bert":
        tokenizer = train_tokenizer(texts, "wordpiece", 300, True)
        tokenizer.enable_truncation(16)  # published tokenizers cut and pad: neither may stay on
        tokenizer.enable_padding(length=16)
        return tokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


@pytest.fixture(scope="module", params=["bert", "bert_lm", "gpt2", "gpt2_lm"])
def hugging_face(request, tmp_path_factory):
    return saved_by_transformers(request.param, tmp_path_factory.mktemp(request.param))


def saved_by_transformers(kind: str, folder):
    """A folder as save_pretrained leaves it, with or without a language-model head."""
    import transformers as hf

    family, _, head = kind.partition("_")
    tokenizer = tokenizer_of(family)
    torch.manual_seed(0)
    if family == "bert":
        config = hf.BertConfig(vocab_size=tokenizer.get_vocab_size() + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                               max_position_embeddings=40)
        model = hf.BertForMaskedLM(config) if head else hf.BertModel(config)
    else:
        config = hf.GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=2, n_head=4, n_positions=40)
        model = hf.GPT2LMHeadModel(config) if head else hf.GPT2Model(config)
    for p in model.parameters():  # biases and norms start as noughts and ones: a mix-up of those would not be seen
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def compare(folder, masks=()):
    """The backbone's states against those of transformers' own AutoModel, on padded rows of text."""
    import transformers as hf

    start = starts.read(f"hf:{folder}")
    assert start.arch is not None and start.modality is not None
    backbone = bundle.build_backbone(start.arch, seed=1).eval()
    moved = bundle.transfer(backbone, start.tensors, start.origin, start.drop)
    assert not moved.new and {name for name in moved.dropped if ".attn." in name} == set(masks)
    modality = bundle.build_modality(start.modality)
    import pyarrow as pa

    arrays, bad = modality.decode(pa.table({"text": sentences(3, seed=8)[0]}), {"text": "text"})
    data = modality.collate(arrays)
    assert not any(bad) and not data["mask"].all()
    with torch.no_grad():
        ours = backbone(Batch(np.arange(3), torch.zeros(3, dtype=torch.long), data)).tokens
        theirs = hf.AutoModel.from_pretrained(folder).eval()(input_ids=data["tokens"], attention_mask=data["mask"].long()).last_hidden_state
    assert ours is not None and (ours - theirs)[data["mask"]].abs().max() < 1e-5 and theirs.abs().max() > 0.1
    return start, moved


def test_a_hugging_face_folder_gives_transformers_own_states(hugging_face):
    start, moved = compare(hugging_face)
    family = json.loads((hugging_face / "config.json").read_text())["model_type"]
    assert start.arch["name"] == f"transformers/{family}"
    assert all(name.startswith(("model.pooler.", "model.cls.", "model.lm_head.")) for name in moved.dropped)  # and each is reported
    assert start.modality["options"]["length"] == 40
    own = Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    own.no_padding()
    own.no_truncation()
    text = sentences(1, seed=8)[0][0] * 3
    modality = bundle.build_modality(start.modality)
    assert modality.tokenizer.encode(text, add_special_tokens=False).ids == own.encode(text, add_special_tokens=False).ids


def test_old_names_of_published_checkpoints(hugging_face, tmp_path):
    """bert-base-uncased on the hub says LayerNorm.gamma and .beta, gpt2 stores its causal masks: transformers reads both, so must we."""
    import shutil

    folder = tmp_path / "old"
    shutil.copytree(hugging_face, folder)
    tensors = load_file(folder / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t.clone() for name, t in tensors.items()}
    prefix = "transformer." if any(name.startswith("transformer.") for name in old) else ""
    masks = []
    if f"{prefix}h.0.attn.c_attn.weight" in old:
        for i in range(2):
            old[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
            old[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
            masks += [f"model.h.{i}.attn.bias", f"model.h.{i}.attn.masked_bias"]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    compare(folder, masks)


def test_a_hub_name_is_its_folder_when_there_is_a_network(hugging_face, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(hugging_face) if name == "some/model" else None)
    named, folder = starts.read("hf-hub:some/model"), starts.read(f"hf:{hugging_face}")
    assert named.origin == "hf-hub:some/model" and named.arch == folder.arch and all(torch.equal(t, folder.tensors[n]) for n, t in named.tensors.items())


def test_a_hub_name_without_a_network_says_what_to_do():
    with pytest.raises(BundleError, match=r"hf-hub:some/model: the model cannot be had from the hub .* into a folder and give hf:FOLDER"):
        starts.read("hf-hub:some/model")


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(plain, tmp_path):
    first, moved, other = tmp_path / "a.safetensors", tmp_path / "elsewhere" / "b.safetensors", tmp_path / "c.safetensors"
    moved.parent.mkdir()
    for path, tensors in ((first, plain), (moved, plain), (other, {**plain, "fc.bias": torch.zeros(10)})):
        save_file(tensors, path)
    assert starts.fingerprint(f"file:{first}") == starts.fingerprint(f"file:{moved}") != starts.fingerprint(f"file:{other}")
    assert starts.fingerprint("timm-hub:resnet18") == "timm-hub:resnet18"


def test_a_task_on_a_hugging_face_folder_survives_a_bundle(hugging_face, tmp_path):
    start = starts.read(f"hf:{hugging_face}")
    backbone = bundle.build_backbone(start.arch, seed=1)
    bundle.transfer(backbone, start.tensors, start.origin, start.drop)
    bundle.save(str(tmp_path / "b"), backbone, start.modality)
    again = starts.read(f"bundle:{tmp_path / 'b'}")
    assert again.arch == backbone.arch and again.modality == start.modality
    twin = bundle.build_backbone(again.arch)
    assert not bundle.transfer(twin, again.tensors, "b", again.drop).dropped
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), backbone.state_dict().values(), strict=True))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "config.json").unlink(), "no config.json in this folder; a Hugging Face folder has config.json, model.safetensors and tokenizer.json"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing; save the model again"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
     "model.safetensors is missing; save the model again with transformers' save_pretrained"),
    (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "t5"})), "model_type 't5' has no adapter; families are bert and gpt2"),
    (lambda f: (f / "tokenizer.json").write_text(Tokenizer.from_str(WORDS).to_str()), r"its tokenizer lacks special tokens"),
])
def test_an_incomplete_folder_says_what_is_missing(tmp_path, spoil, message):
    spoil(saved_by_transformers("bert", tmp_path))
    with pytest.raises(BundleError, match=message):
        starts.read(f"hf:{tmp_path}")


WORDS = json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
                    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}})
