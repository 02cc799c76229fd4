"""Configurations from outside: no key that fetches or imports code reaches transformers, and no
absurd size.
"""

import json

import pytest
import torch
import transformers as hf
from checkpoints.test_hf_text import saved
from safetensors.torch import save_file

from pipeline.checkpoints import bundle, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import hf_config
from pipeline.core.specs import Architecture

FETCHING = {
    "attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation": "kernels-community/flash-attn",
    "dtype": "os.system",
    "torch_dtype": "os.system",
    "kernel_config": {"Linear": "someone/kernel"},
    "use_kernels": True,
    "_name_or_path": "someone/model",
    "experts_implementation": "someone/kernel",
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "code.Pipe"}},
    "vision_config": {"model_type": "llava"},
    "encoder": {"model_type": "bert"},
}
"""Keys at which transformers would fetch or import something, or build another model."""


def test_keys_that_fetch_or_import_code_never_reach_transformers(tmp_path, monkeypatch):
    seen = []
    plain = hf.BertConfig.__init__

    def watched(self, *words, **given):
        seen.append(set(given))
        plain(self, *words, **given)

    folder = saved("bert", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **FETCHING}))
    monkeypatch.setattr(hf.BertConfig, "__init__", watched)
    start = pretrained.read(f"hf:{folder}")
    backbone = bundle.build_backbone(start.arch, seed=1)
    assert not start.load_into(backbone).new
    held = Architecture(
        start.arch.name, {"config": {**start.arch.options["config"], **FETCHING}}, start.arch.inputs
    )
    bundle.build_backbone(held, seed=1)  # a bundle from elsewhere, or the option config of a job
    assert len(seen) >= 2 and not [keys & {*FETCHING} for keys in seen if keys & {*FETCHING}]
    assert backbone.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("key", ["auto_map", "quantization_config"])
def test_a_model_of_other_code_is_refused(key, tmp_path):
    """Its weights would give other numbers in the family's own class, without a word."""
    folder = saved("bert", tmp_path)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), key: {"AutoModel": "modeling.Other"}})
    )
    with pytest.raises(
        BundleError,
        match=rf"config\.json: {key}: the model is computed by other code than bert's own, and "
        r"none from outside is run",
    ) as caught:
        pretrained.read(f"hf:{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        (
            "bert",
            {"hidden_size": 1 << 40},
            "hidden_size: 1099511627776 is beyond every model of this kind",
        ),
        (
            "bert",
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers: 1000000000 is beyond every model of this kind \(at most 512\)",
        ),
        ("bert", {"vocab_size": 10**9}, "vocab_size: 1000000000 is beyond"),
        (
            "bert",
            {"hidden_size": 60000, "intermediate_size": 60000, "num_hidden_layers": 500},
            r"it describes a model of .* parameters, more than 2e\+10",
        ),
        ("gpt2", {"n_positions": 1 << 40}, "n_positions: .* is beyond"),
        ("gpt2", {"n_embd": -5}, "n_embd: -5 is beyond"),
        ("wav2vec2", {"conv_dim": [512] * 1000}, "conv_dim: .* is no plain value"),
        ("wav2vec2", {"conv_dim": [65536] * 7, "conv_kernel": [10] * 7}, "it describes a model of"),
        ("bert", {"hidden_act": "../../evil"}, "hidden_act: '../../evil' is no plain word"),
        ("bert", {"hidden_act": {"a": 1}}, "hidden_act: {'a': 1} is no plain value"),
        ("bert", {"hidden_size": float("inf")}, "hidden_size"),
        ("bert", {"hidden_act": "no_such_activation"}, "transformers/bert: config: hidden_act: "),
    ],
)
def test_absurd_values_are_one_line_before_anything_is_built(family, given, said):
    inputs = {"vocabulary": 10, "length": 8, "specials": [0, 1, 2, 3, 4], "features": "wave"}
    with pytest.raises(ValueError, match=said) as caught:
        bundle.build_backbone(Architecture(f"transformers/{family}", {"config": given}, inputs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["BertConfig", "RobertaConfig", "DistilBertConfig", "GPT2Config", "Wav2Vec2Config"]
)
def test_what_says_how_a_model_is_built_is_kept(name):
    config = getattr(hf, name)()
    own = {
        key: value for key, value in config.to_dict().items() if key in type(config).__annotations__
    }
    assert own.keys() <= hf_config.plain(config.model_type, config.to_dict()).keys() | {
        "tie_word_embeddings"
    }
    assert hf_config.plain(config.model_type, own) == own


@pytest.mark.parametrize("size", [[3, 100_000, 100_000], [3, "a", "a"], [7, 64, 64]])
def test_an_absurd_input_of_a_timm_folder_is_one_line(size, tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["input_size"] = size
    path.write_text(json.dumps(config))
    save_file(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        },
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        BundleError,
        match=r"timm/test_vit: its configuration says input_size .* images have 1 or 3 channels "
        r"and 8 to 4096 pixels",
    ):
        pretrained.read(f"hf:{tmp_path}")
