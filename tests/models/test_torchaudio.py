"""Deep Speech, Deep Speech 2 and Conformer: torchaudio's own outputs, plain loops, nothing of the
padding in a row.
"""

import numpy as np
import pytest
import torch
import torchaudio
from torch.nn import functional as F

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.contracts.backbone_capabilities import hides_frames
from pipeline.core.nn import conv_arithmetic
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.models.torchaudio import Front

BINS = 12
INPUTS = {"features": "mel", "rate": 16000, "channels": BINS, "convolutions": [[400, 160, 0]]}
OPTIONS = {
    "deepspeech": {"hidden": 16, "context": 2},
    "deepspeech2": {"hidden": 8, "channels": 10, "kernels": [5, 3]},
    "conformer": {
        "hidden": 16,
        "heads": 2,
        "intermediate": 24,
        "kernel": 7,
        "layers": 2,
        "channels": 3,
    },
}
VARIANTS = {
    **OPTIONS,
    "plane": {**OPTIONS["deepspeech2"], "convolution": "time_frequency", "channels": 3},
}
SIZES = (23, 1, 37, 0, 8)


def build(variant: str, inputs=None, **options):
    name = f"torchaudio/{'deepspeech2' if variant == 'plane' else variant}"
    backbone = bundle.build_backbone(
        Architecture(name, {**VARIANTS[variant], **options}, inputs or INPUTS), seed=1
    ).eval()
    # weights that are not what they begin as, so that no bias and no norm can be forgotten unseen
    with torch.no_grad():
        for i, p in enumerate(backbone.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return backbone


def mels(*sizes: int, behind: float = 0.0) -> Batch:
    mask = torch.arange(max(sizes, default=0))[None] < torch.tensor(sizes)[:, None]
    mel = torch.randn(*mask.shape, BINS, generator=torch.Generator().manual_seed(0))
    return Batch(
        np.arange(len(sizes)),
        torch.arange(len(sizes)),
        {"mel": torch.where(mask[:, :, None], mel, behind), "mask": mask},
    )


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


# ---------------------------------------------------------------- padding


@torch.no_grad()
@pytest.mark.parametrize("behind", [0.0, 3.0])
def test_a_row_gives_the_same_alone_and_padded(variant, behind):
    backbone, batch = build(variant), mels(*SIZES, behind=behind)
    found = backbone(batch)
    assert (
        found.tokens.shape[2] == found.pooled.shape[1] == backbone.token_dim == backbone.pooled_dim
    )
    for row, size in enumerate(SIZES):
        count = int(found.mask[row].sum())
        assert (found.tokens[row, count:] == 0).all()
        if not size:
            assert count == 0 and (found.pooled[row] == 0).all()
            continue
        alone = backbone(
            Batch(
                np.arange(1),
                torch.arange(1),
                {
                    "mel": batch["mel"][row : row + 1, :size],
                    "mask": batch["mask"][row : row + 1, :size],
                },
            )
        )
        assert alone.mask.all() and alone.tokens.shape[1] == count
        assert (found.tokens[row, :count] - alone.tokens[0]).abs().max() < 1e-5
        assert (found.pooled[row] - alone.tokens[0].mean(0)).abs().max() < 1e-5
        assert alone.tokens.std() > 0.01


@torch.no_grad()
def test_lengths_are_those_that_the_convolutions_tell(variant):
    for options in ({}, {"strides": [3] if variant == "deepspeech" else [1, 3]}):
        backbone = build(variant, **options)
        samples = torch.tensor([16000, 401, 7777, 300, 0])
        found = backbone(mels(*conv_arithmetic.count(samples, INPUTS["convolutions"]).tolist()))
        assert (
            found.mask.sum(1).tolist()
            == conv_arithmetic.count(samples, backbone.convolutions).tolist()
        )
        assert conv_arithmetic.stride(backbone.convolutions) == 160 * (
            np.prod(options["strides"]) if options else (2 if variant == "deepspeech" else 4)
        )


def test_rows_without_frames_have_finite_gradients(variant):
    for batch in (mels(0, 0), mels(0, 9)):
        backbone = build(variant).train()
        found = backbone(batch)
        assert not found.mask[0].any() and (found.pooled[0] == 0).all()
        (found.pooled.square().sum() + found.tokens.square().sum()).backward()
        assert all(
            torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None
        )


def test_no_row_of_the_softmax_is_empty():
    """Not every kernel of attention stands that."""
    backbone, masks = build("conformer"), []
    for layer in backbone.conformer.conformer_layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, inputs, words: masks.append(words["key_padding_mask"]), with_kwargs=True
        )
    backbone(mels(0, 9))
    assert len(masks) == 2 and all(
        torch.equal((~mask).sum(1), torch.tensor([1, 3])) for mask in masks
    )


# ---------------------------------------------------------------- torchaudio's own, and loops


@torch.no_grad()
def test_deepspeech_is_torchaudios_up_to_its_output_layer():
    """With its own weights by their own names; the frames around each one are stacked in a loop."""
    backbone = build("deepspeech", strides=[1])
    model = torchaudio.models.DeepSpeech(5 * BINS, n_hidden=16, n_class=7).eval()
    missing, unexpected = model.load_state_dict(
        {n.removeprefix("deepspeech."): t for n, t in backbone.state_dict().items()}, strict=False
    )
    assert set(missing) == {"out.weight", "out.bias"} and not unexpected
    mel, silence = mels(9)["mel"][0], torch.zeros(BINS)
    stacked = torch.stack(
        [
            torch.cat([mel[t + d] if 0 <= t + d < 9 else silence for d in range(-2, 3)])
            for t in range(9)
        ]
    )
    want = model(stacked[None, None])[0]
    found = backbone(mels(9)).tokens[0]
    assert (F.log_softmax(model.out(found), -1) - want).abs().max() < 1e-5
    halved = build("deepspeech")  # the same weights, every second step
    assert torch.equal(
        halved.state_dict()["deepspeech.fc1.fc.weight"],
        backbone.state_dict()["deepspeech.fc1.fc.weight"],
    )
    want = model(stacked[None, None, ::2])[0]
    assert (F.log_softmax(model.out(halved(mels(9)).tokens[0]), -1) - want).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["time", "time_frequency"])
def test_deepspeech2_is_a_loop_over_its_parts(kind):
    """Convolution by unfolded windows, GRU cells step by step in both directions."""
    backbone = build("plane" if kind == "time_frequency" else "deepspeech2", strides=[2, 1])
    x = mels(11)["mel"][0]
    for number, (kernel, stride) in enumerate(((5, 2), (3, 1))):
        layer = backbone.front.layers[number]
        weight, bias = layer["convolution"].weight, layer["convolution"].bias
        out = []
        for t in range((len(x) - 1) // stride + 1):
            places = [t * stride + d for d in range(-(kernel // 2), kernel // 2 + 1)]
            window = torch.stack(
                [x[place] if 0 <= place < len(x) else torch.zeros(x.shape[1]) for place in places]
            )
            if kind == "time":
                step = torch.einsum("oit,ti->o", weight, window) + bias
            else:
                high = weight.shape[3]
                # T, in, places, high
                plane = F.pad(
                    window.unflatten(1, (weight.shape[1], -1)), (high // 2, high // 2)
                ).unfold(2, high, 2)
                step = (torch.einsum("oith,tiph->op", weight, plane) + bias[:, None]).flatten()
            out.append(
                F.layer_norm(step, step.shape, layer["norm"].weight, layer["norm"].bias).clamp(
                    0, 20
                )
            )
        x = torch.stack(out)
    for layer in backbone.recurrent:
        sides = []
        for suffix, steps in (("", range(len(x))), ("_reverse", reversed(range(len(x))))):
            cell = torch.nn.GRUCell(x.shape[1], 8)
            cell.load_state_dict(
                {
                    part: getattr(layer.gru, f"{part}_l0{suffix}")
                    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
            )
            h, states = torch.zeros(1, 8), {}
            for t in steps:
                h = states[t] = cell(x[t][None], h)
            sides.append(torch.cat([states[t] for t in range(len(x))]))
        x = layer.norm(torch.cat(sides, dim=1))
    assert (backbone(mels(11)).tokens[0] - x).abs().max() < 1e-5


@torch.no_grad()
def test_conformer_rows_in_a_batch_are_those_of_torchaudio_alone():
    """torchaudio's own model on one row at a time, without padding, behind the same subsampling:
    its group norm would see padding.
    """
    backbone = build("conformer")
    model = torchaudio.models.Conformer(16, 2, 24, 2, 7, use_group_norm=True).eval()
    model.load_state_dict(
        {
            n.removeprefix("conformer."): t
            for n, t in backbone.state_dict().items()
            if n.startswith("conformer.")
        }
    )
    batch = mels(30, 11, 40)
    found = backbone(batch)
    padded_by_theirs = 0.0
    entered, lengths = backbone.front(batch["mel"], batch["mask"].sum(1))
    together = model(backbone.enter(entered), lengths)[0]
    for row, size in enumerate((30, 11, 40)):
        alone, length = backbone.front(batch["mel"][row : row + 1, :size], torch.tensor([size]))
        want = model(backbone.enter(alone), length)[0][0]
        assert (found.tokens[row, : len(want)] - want).abs().max() < 1e-5
        padded_by_theirs = max(
            padded_by_theirs, float((together[row, : len(want)] - want).abs().max())
        )
    assert padded_by_theirs > 1e-3, (
        "if torchaudio keeps padding out by now, its own layers can be called"
    )


@torch.no_grad()
def test_the_subsampling_is_torchs_on_a_whole_row():
    front, x = build("conformer").front, mels(21)["mel"]
    y = x[:, None]
    for layer in front.layers:
        y = layer["convolution"](y)
        assert layer["convolution"].stride == (2, 2)
        flat = layer["norm"](y.transpose(1, 2).flatten(2)).relu()
        y = flat.unflatten(2, (3, -1)).transpose(1, 2)
    assert torch.allclose(front(x, torch.tensor([21]))[0], flat, atol=1e-6) and flat.shape == (
        1,
        6,
        9,
    )


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_compute_the_gradients_that_torchs_own_kernels_compute(two_threads):
    """With 23 steps as they are, oneDNN's are wrong in about half of the runs; so this runs often,
    and looks at what the convolution is given.
    """
    torch.manual_seed(0)
    front = Front(256, 256, [11], [2], plane=False, wide=True)
    x, lengths = torch.randn(41, 23, 256, requires_grad=True), torch.full((41,), 23)
    given = []
    front.layers[0]["convolution"].register_forward_pre_hook(
        lambda module, inputs: given.append(inputs[0].shape[2])
    )
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[attr-defined]
        out, _ = front(x, lengths)
        direction = torch.randn(out.shape)
        (wanted,) = torch.autograd.grad(out, x, direction)
    for _ in range(10):
        (found,) = torch.autograd.grad(front(x, lengths)[0], x, direction)
        assert (found - wanted).abs().max() < 1e-4
    assert set(given) == {24}


# ---------------------------------------------------------------- the contract


def test_layers_are_in_order_and_hold_each_parameter_once(variant):
    backbone = build(variant, **({} if variant == "deepspeech" else {"layers": 11}))
    layers = backbone.layers()
    numbers = [f"{i:02d}" for i in range(11)]
    want = {
        "deepspeech": ["fc1", "fc2", "fc3", "bi_rnn", "fc4"],
        "conformer": ["enter", *[f"block{n}" for n in numbers]],
    }
    start = [] if variant == "deepspeech" else ["convolution00", "convolution01"]
    assert list(layers) == start + want.get(variant, [f"recurrent{n}" for n in numbers])
    assert [name for names in layers.values() for name in names] == [
        name for name, _ in backbone.named_parameters()
    ]


def test_every_parameter_has_a_gradient(variant):
    backbone = build(variant).train()
    backbone(mels(*SIZES)).tokens.square().sum().backward()
    without = [
        name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ]
    assert without == ([] if variant == "deepspeech" else ["front.mask_embedding"]) and all(
        p.grad is not None for p in backbone.parameters()
    )
    if variant != "deepspeech":
        backbone(
            batch := mels(*SIZES), token_mask=backbone.frame_mask(batch)
        ).tokens.square().sum().backward()
        assert backbone.front.mask_embedding.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("variant", ["deepspeech2", "plane", "conformer"])
def test_hidden_steps_are_not_seen_and_latent_is(variant):
    """What stands behind hidden steps changes ``latent`` there, and no token of the row."""
    backbone, batch = build(variant), mels(40, 24)
    mask = backbone.frame_mask(batch)
    assert (
        torch.equal(mask, backbone(batch).mask) and mask.shape == backbone(batch).tokens.shape[:2]
    )
    spans = torch.zeros_like(mask)
    spans[:, 4:] = mask[:, 4:]
    other = Batch(batch.rows, batch.keys, {"mel": batch["mel"].clone(), "mask": batch["mask"]})
    other["mel"][:, 22:] += 1.0  # beyond what the first four steps see
    ours, theirs = (
        backbone(one, token_mask=spans, want=("tokens", "latent", "convolved"))
        for one in (batch, other)
    )
    assert ours.latent.shape == (2, 10, backbone.latent_dim) and torch.equal(
        ours.latent, ours.stages["convolved"]
    )
    assert torch.equal(ours.latent[:, :4], theirs.latent[:, :4]) and not torch.equal(
        ours.latent[:, 5:], theirs.latent[:, 5:]
    )
    assert torch.equal(ours.tokens, theirs.tokens) and not torch.equal(
        ours.tokens, backbone(batch).tokens
    )
    assert ours.latent is not None and backbone(batch).latent is None


def test_dropout_is_there_in_training_alone(variant):
    backbone, batch = build(variant, dropout=0.5), mels(20)
    assert torch.equal(backbone(batch).pooled, backbone(batch).pooled)
    backbone.train()
    assert not torch.equal(backbone(batch).pooled, backbone(batch).pooled)
    if variant == "conformer":
        assert {
            module.p for module in backbone.modules() if isinstance(module, torch.nn.Dropout)
        } == {0.5}
        assert {
            module.dropout
            for module in backbone.modules()
            if isinstance(module, torch.nn.MultiheadAttention)
        } == {0.5}


def test_bf16_stays_close_and_finite(variant):
    backbone, batch = build(variant), mels(*SIZES)
    whole = backbone(batch).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backbone(batch)
        found.pooled.square().sum().backward()
    assert (found.pooled - whole).abs().max() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@torch.no_grad()
def test_a_bundle_gives_the_same_backbone(variant, tmp_path):
    """Also when the defaults have changed since: every option stands in it."""
    backbone = build(variant)
    bundle.save(str(tmp_path / "b"), backbone, ModalitySpec("audio", {}, {}))
    held = bundle.load(str(tmp_path / "b"))
    assert None not in held.manifest.arch.options.values()
    other = bundle.build_backbone(held.manifest.arch, seed=9).eval()
    assert bundle.transfer(other, held.backbone_tensors(), "b").new == ()
    assert (
        torch.equal(other(mels(*SIZES)).tokens, backbone(mels(*SIZES)).tokens)
        and other.convolutions == backbone.convolutions
    )


@pytest.mark.parametrize(
    ("variant", "inputs", "options", "message"),
    [
        (
            "deepspeech",
            {"features": "wave", "rate": 16000, "channels": 1, "convolutions": []},
            {},
            "reads log-mel frames .*; these rows are wave",
        ),
        ("conformer", {"vocabulary": 10, "length": 5}, {}, "these rows are vocabulary, length"),
        ("deepspeech", None, {"layers": 2}, "has no layers: leave it out"),
        ("deepspeech", None, {"strides": [2, 2]}, r"strides \[2, 2\] must be one number"),
        ("deepspeech2", None, {"heads": 2}, "has no heads: leave it out"),
        ("deepspeech2", None, {"kernels": [5, 4]}, r"kernels \[5, 4\] must be odd"),
        (
            "deepspeech2",
            None,
            {"kernels": [5]},
            r"strides \[2, 2\] and kernels \[5\] must be as many",
        ),
        ("deepspeech2", None, {"strides": [2, 0]}, r"strides \[2, 0\] must be 1 or more"),
        ("conformer", None, {"kernel": 8}, "kernel 8 must be odd"),
        ("conformer", None, {"hidden": 18, "heads": 4}, "heads 4 must divide hidden 18"),
    ],
)
def test_what_does_not_fit_is_refused(variant, inputs, options, message):
    with pytest.raises(ValueError, match=f"torchaudio/{variant}.*{message}"):
        build(variant, inputs, **options)


def test_deepspeech_cannot_hide_steps():
    assert hides_frames(build("deepspeech2")) and not hides_frames(build("deepspeech"))
    with pytest.raises(ValueError, match="cannot leave tokens out"):
        build("deepspeech")(mels(20), token_mask=torch.zeros(1, 5, dtype=torch.bool))
