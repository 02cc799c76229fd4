"""wav2vec 2.0: transformers' own states, rows that do not know of their batch, both norms, masks,
layers, what is refused.
"""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from toys import furthest, weights

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.nn import conv_arithmetic
from pipeline.core.specs import Architecture, ModalitySpec

INPUTS = {"features": "wave", "rate": 16000, "channels": 1, "convolutions": []}
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "conv_channels": 24}
GROUP = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
}
"""As the published base models, but small."""
KINDS = {
    "sizes": SIZES,
    "group": {"config": GROUP},
    "layer": {"config": {**GROUP, "feat_extract_norm": "layer", "do_stable_layer_norm": True}},
}
LENGTHS = (3000, 8000, 0, 401, 399)


def build(kind: str = "sizes", inputs=None, **options):
    given = {**KINDS[kind], **options}
    made = bundle.build_backbone(
        Architecture("transformers/wav2vec2", given, inputs or INPUTS), seed=2
    ).eval()
    with torch.no_grad():  # norms and biases that are not what they begin as
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return made


def batch_of(lengths=LENGTHS, seed: int = 0, width: int = 0) -> Batch:
    n = width or max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    wave = torch.randn(len(lengths), n, generator=torch.Generator().manual_seed(seed)) * mask
    return Batch(
        np.arange(len(lengths)), torch.arange(len(lengths)) * 7919, {"wave": wave, "mask": mask}
    )


def reference(backbone):
    """transformers' own model with the same weights."""
    config = hf.Wav2Vec2Config.from_dict(json.loads(json.dumps(backbone.model.config.to_dict())))
    model = hf.Wav2Vec2Model(config).eval()
    model.load_state_dict(backbone.model.state_dict())
    return model


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@torch.no_grad()
def test_a_padded_row_has_the_states_that_transformers_gives_it_alone(kind):
    backbone, batch = build(kind), batch_of()
    found, model = backbone(batch, want=("tokens", "latent")), reference(backbone)
    for row, length in enumerate(LENGTHS):
        n = int(found.mask[row].sum())
        assert (
            n
            == conv_arithmetic.count(length, backbone.convolutions)
            == max(0, int(model._get_feat_extract_output_lengths(length)))
        )
        if n:
            want = model(batch["wave"][row : row + 1, :length])
            assert (
                found.tokens[row, :n] - want.last_hidden_state[0]
            ).abs().max() < 1e-5 and want.last_hidden_state.std() > 0.1
            assert (found.latent[row, :n] - want.extract_features[0]).abs().max() < 1e-5
            assert (found.pooled[row] - want.last_hidden_state[0].mean(0)).abs().max() < 1e-5
    assert (
        found.pooled.shape == (5, backbone.pooled_dim)
        and not found.pooled[[2, 4]].any()
        and torch.isfinite(found.tokens).all()
    )


@torch.no_grad()
def test_padded_batches_are_those_of_transformers_with_its_attention_mask():
    """Where the norm is that of each frame; with the group norm transformers' padded rows are not
    its lone ones.
    """
    lengths = (3000, 8000, 401)
    for kind, same in (("layer", True), ("group", False)):
        backbone, batch = build(kind), batch_of(lengths)
        found = backbone(batch)
        want = reference(backbone)(
            batch["wave"], attention_mask=batch["mask"].long()
        ).last_hidden_state
        assert ((found.tokens - want)[found.mask].abs().max() < 1e-5) == same


@torch.no_grad()
def test_what_a_row_gives_does_not_depend_on_its_padding(kind):
    backbone = build(kind)
    narrow, wide = batch_of((2500,)), batch_of((2500, 9000), width=9600)
    wide["wave"][0] = 0
    wide["wave"][0, :2500] = narrow["wave"][0]
    a, b = backbone(narrow), backbone(wide)
    n = a.mask.shape[1]
    assert torch.equal(b.mask[0], torch.arange(b.mask.shape[1]) < n)
    assert (a.pooled[0] - b.pooled[0]).abs().max() < 1e-5 and (
        a.tokens[0] - b.tokens[0, :n]
    ).abs().max() < 1e-5


@torch.no_grad()
def test_rows_without_a_frame_have_no_features(kind):
    """Also where nobody in the batch has one, and with no samples at all."""
    backbone = build(kind)
    for batch in (batch_of((0, 5)), batch_of((0,), width=399), batch_of((0,))):
        found = backbone(batch, want=("tokens", "latent"))
        assert (
            not found.mask.any()
            and not found.pooled.any()
            and torch.isfinite(found.tokens).all()
            and found.mask.shape[1] == 1
        )


@torch.no_grad()
def test_hidden_frames_are_those_of_transformers(kind):
    backbone, batch = build(kind), batch_of((8000, 8000))
    hidden = (
        torch.rand(backbone.frame_mask(batch).shape, generator=torch.Generator().manual_seed(3))
        < 0.4
    )
    want = reference(backbone)(batch["wave"], mask_time_indices=hidden.clone()).last_hidden_state
    found = backbone(batch, token_mask=hidden).tokens
    assert (found - want).abs().max() < 1e-5 and (found - backbone(batch).tokens).abs().max() > 0.1
    assert torch.equal(
        backbone(batch, token_mask=hidden, want=("latent",)).latent,
        backbone(batch, want=("latent",)).latent,
    ), "targets are not hidden"


def test_a_configuration_without_an_embedding_for_masks_says_so():
    backbone = build("group", config={**GROUP, "mask_time_prob": 0.0})
    with pytest.raises(ValueError, match="its configuration has mask_time_prob: 0"):
        backbone(batch_of((800,)), token_mask=torch.ones(1, 2, dtype=torch.bool))


def test_nothing_of_the_configuration_is_random_in_training_but_dropout(kind):
    """SpecAugment and LayerDrop of the configuration are off."""
    still = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.5,
        "mask_feature_prob": 0.5,
    }
    backbone = build(
        kind,
        **({"dropout": 0.0} if kind == "sizes" else {"config": {**KINDS[kind]["config"], **still}}),
    )
    batch = batch_of((8000, 3000))
    calm = backbone(batch).tokens
    assert (
        backbone.train()(batch).tokens - calm
    ).abs().max() < 1e-6 and backbone.model.config.layerdrop == 0


def test_every_parameter_has_a_gradient(kind):
    """DDP waits for each: that of the mask too, where nothing is hidden."""
    backbone = build(kind).train()
    (backbone(batch_of()).pooled ** 2).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())
    assert [n for n, p in backbone.named_parameters() if not p.grad.any()] == [
        "model.masked_spec_embed"
    ]


def test_layers_are_in_order_and_hold_each_parameter_once(kind):
    backbone = build(kind)
    layers = backbone.layers()
    assert list(layers) == [
        "convolutions",
        "projection",
        "positions",
        "block00",
        "block01",
        *(["norm"] if kind != "group" else []),
    ]
    assert sorted(name for names in layers.values() for name in names) == sorted(
        name for name, _ in backbone.named_parameters()
    )
    assert ("model.encoder.layer_norm.weight" in layers["positions"]) == (kind == "group"), (
        "before the blocks, or behind them"
    )


def test_sizes_are_the_papers():
    backbone = build("sizes", conv_channels=None, hidden=640, heads=8)
    config = backbone.model.config
    assert (
        conv_arithmetic.stride(backbone.convolutions) == 320
        and conv_arithmetic.field(backbone.convolutions) == 400
    )
    assert (
        config.conv_dim == [512] * 7
        and config.intermediate_size == 2560
        and backbone.latent_dim == 512
        and config.layerdrop == 0
    )
    short = build("sizes", conv_kernels=[8, 4], conv_strides=[4, 2])
    assert short.convolutions == ((8, 4, 0), (4, 2, 0)) and short(batch_of((100,))).mask.shape == (
        1,
        11,
    )


def test_the_network_is_built_on_the_meta_device():
    with torch.device("meta"):
        backbone = bundle.build_backbone(
            Architecture("transformers/wav2vec2", {"config": GROUP}, INPUTS)
        )
    assert (
        backbone.model.feature_projection.projection.weight.is_meta
        and len(backbone.convolutions) == 7
    )


@torch.no_grad()
def test_a_bundle_gives_the_same_features(kind, tmp_path):
    backbone = build(kind)
    bundle.save(str(tmp_path / "b"), backbone, ModalitySpec("audio", {}, {}))
    found = bundle.load(str(tmp_path / "b"))
    twin = bundle.build_backbone(found.manifest.arch, seed=9).eval()
    moved = bundle.transfer(twin, found.backbone_tensors(), "bundle")
    assert not moved.new and not moved.dropped and furthest(weights(twin), weights(backbone)) == 0
    assert torch.equal(twin(batch_of()).pooled, backbone(batch_of()).pooled)


def test_the_old_names_of_the_positions_weight_are_known():
    backbone = build()
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in weights(backbone).items()
    }
    twin = build()
    with torch.no_grad():
        twin.model.encoder.pos_conv_embed.conv.parametrizations.weight.original1.zero_()
    assert (
        "model.encoder.pos_conv_embed.conv.weight_v" in old
        and not bundle.transfer(twin, old, "file").new
    )
    assert furthest(weights(twin), weights(backbone)) == 0


def test_bfloat16_gives_finite_states(kind):
    """With torch's own kernels: oneDNN's for bfloat16 were seen to be wrong by a quarter on one
    processor (AMX).
    """
    backbone, batch = build(kind), batch_of()
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[attr-defined]
        exact = backbone(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backbone(batch)
    assert (
        torch.isfinite(found.tokens).all()
        and (found.tokens.float() - exact.tokens)[exact.mask].norm()
        < 0.03 * exact.tokens[exact.mask].norm()
    )


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        (
            {},
            {"features": "mel", "rate": 16000, "channels": 80, "convolutions": [[400, 160, 0]]},
            r"transformers/wav2vec2 reads samples \(modality audio with features: wave\); "
            r"these rows are mel",
        ),
        (
            {},
            {"vocabulary": 30, "length": 8, "specials": [0, 1, 2, 3, 4]},
            "these rows are vocabulary, length, specials",
        ),
        ({"pool": "first"}, INPUTS, "pools by the mean of its frames"),
        ({"positions": 64}, INPUTS, "transformers/wav2vec2 has no positions: texts have that"),
        ({"heads": 5}, INPUTS, "heads 5 must divide hidden 32"),
        (
            {"conv_kernels": [3, 3]},
            INPUTS,
            r"conv_kernels \[3, 3\] and conv_strides \[5, 2, 2, 2, 2, 2, 2\] must be as many",
        ),
        (
            {"config": {**GROUP, "add_adapter": True}},
            INPUTS,
            "the configuration says add_adapter: true",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, inputs, message):
    with pytest.raises(ValueError, match=message):
        build("sizes", inputs, **options)


@pytest.mark.parametrize("name", ["conv_channels", "conv_kernels", "conv_strides"])
def test_families_for_texts_refuse_what_is_wav2vec2s(name):
    inputs = {"vocabulary": 30, "length": 8, "specials": [0, 1, 2, 3, 4]}
    with pytest.raises(
        ValueError, match=f"transformers/bert has no {name}: wav2vec2 has that; leave it out"
    ):
        bundle.build_backbone(
            Architecture("transformers/bert", {name: 8 if name == "conv_channels" else [8]}, inputs)
        )
