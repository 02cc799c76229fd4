"""WaveNet: causal, of the receptive field that it states, equal to a plain loop over samples, blind
to padding.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchaudio.functional import mu_law_decoding, mu_law_encoding

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.nn import conv_arithmetic
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.objectives.ctc import CTC, CTCOptions

INPUTS = {"features": "wave", "rate": 8000, "channels": 1, "convolutions": []}
SMALL = {
    "layers": 3,
    "stacks": 2,
    "residual": 6,
    "skip": 5,
    "pool": 10,
    "frame_layers": 2,
    "frame_kernel": 3,
}


def build(inputs=None, **options):
    backbone = bundle.build_backbone(
        Architecture("wavenet/wavenet", {**SMALL, **options}, inputs or INPUTS), seed=3
    ).eval()
    with torch.no_grad():  # weights that are not what they begin as, so that no zero hides a layer
        for i, p in enumerate(backbone.parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return backbone


def waves(*sizes: int, seed: int = 0, behind: float = 0.0) -> Batch:
    mask = torch.arange(max(sizes, default=0))[None] < torch.tensor(sizes)[:, None]
    wave = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(
        np.arange(len(sizes)),
        torch.arange(len(sizes)),
        {"wave": torch.where(mask, wave, behind), "mask": mask},
    )


def latent(backbone, wave: torch.Tensor) -> torch.Tensor:
    return backbone(
        Batch(np.arange(len(wave)), torch.arange(len(wave)), {"wave": wave, "mask": wave < 9}),
        want=("latent",),
    ).latent


@pytest.mark.parametrize(
    ("layers", "stacks", "kernel", "field"),
    [(3, 2, 2, 15), (4, 1, 2, 16), (2, 3, 3, 19), (1, 1, 2, 2)],
)
def test_wavenet_is_causal_and_its_receptive_field_is_as_stated(layers, stacks, kernel, field):
    """By the gradient of each output with respect to each sample's vector: none ahead, none further
    back than stated, all between.
    """
    backbone = build(layers=layers, stacks=stacks, kernel=kernel)
    assert backbone.receptive_field == field
    seen = []

    def watch(module, inputs, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    backbone.embed.register_forward_hook(watch)
    n = 3 * field
    out = latent(backbone, waves(n)["wave"])
    for t in range(n):
        own = torch.autograd.grad(out[0, t].sum(), seen[0], retain_graph=True)[0][0].abs().sum(1)
        touched = own.nonzero()[:, 0].tolist()
        assert touched == list(range(max(0, t - field + 1), t + 1)), t


def test_the_published_stack_sees_1024_samples():
    """Section 2.1: dilations 1, 2, 4, ... 512 have a receptive field of 1024."""
    assert build(layers=10, stacks=1, residual=2, skip=2).receptive_field == 1024
    assert (
        bundle.build_backbone(Architecture("wavenet/wavenet", {}, INPUTS)).receptive_field
        == 1 + 2 * 1023
    )


@torch.no_grad()
def test_the_latent_is_that_of_a_loop_over_samples():
    """Equation 2 and figure 4, one sample and one layer after the other."""
    backbone = build()
    wave = waves(40)["wave"]
    level = mu_law_encoding(wave, 256)[0]
    x = [backbone.embed.weight[int(k)] for k in level]
    skip = [torch.zeros(5) for _ in x]
    for number, block in enumerate(backbone.blocks):
        dilation, following = 2 ** (number % 3), []
        weight, bias = block.dilated.weight, block.dilated.bias
        for t in range(len(x)):
            before = x[t - dilation] if t >= dilation else torch.zeros_like(x[0])
            both = weight[:, :, 0] @ before + weight[:, :, 1] @ x[t] + bias
            gated = both[:6].tanh() * both[6:].sigmoid()
            out = block.out.weight[:, :, 0] @ gated + block.out.bias
            skip[t] = skip[t] + out[-5:]
            following.append(x[t] + out[:6] if number < 5 else x[t])
        x = following
    assert (latent(backbone, wave)[0] - torch.stack(skip)).abs().max() < 1e-5


@torch.no_grad()
def test_tokens_are_the_means_of_the_rectified_sum():
    backbone = build(frame_layers=0)
    batch = waves(57)
    found = backbone(batch, want=("latent",))
    means = found.latent[0, :50].relu().view(5, 10, 5).mean(1)
    assert torch.allclose(
        found.tokens[0], backbone.norm(means), atol=1e-6
    ) and found.mask.tolist() == [[True] * 5]
    assert torch.allclose(found.pooled[0], found.tokens[0].mean(0), atol=1e-6)


@torch.no_grad()
def test_the_convolutions_over_tokens_see_both_sides_and_begin_as_nothing():
    fresh = bundle.build_backbone(Architecture("wavenet/wavenet", SMALL, INPUTS), seed=3).eval()
    without = bundle.build_backbone(
        Architecture("wavenet/wavenet", {**SMALL, "frame_layers": 0}, INPUTS), seed=5
    ).eval()
    without.load_state_dict(
        {n: t for n, t in fresh.state_dict().items() if not n.startswith("frames.")}
    )
    batch = waves(100)
    assert torch.equal(fresh(batch).tokens, without(batch).tokens)
    backbone, other = build(), batch["wave"].clone()
    other[0, 50:60] *= -1  # token 5
    changed = (backbone(batch).tokens - backbone(batch.replace(wave=other)).tokens).abs().sum(2)[
        0
    ] > 0
    assert changed.tolist() == [False] * 3 + [True] * 7, (
        "two convolutions of three tokens, and the past reaches on"
    )


@torch.no_grad()
def test_convolutions_over_tokens_that_were_never_trained_are_made_anew():
    """By a fixed seed, each from numbers of its own, whatever the generator's state, which stays as
    it is; those that were trained are left alone.
    """
    found = []
    for seed, trained in ((1, None), (2, None), (3, 1)):
        backbone = bundle.build_backbone(Architecture("wavenet/wavenet", SMALL, INPUTS), seed=seed)
        for block in backbone.frames:
            block.wide.weight.mul_(0.1)
        if trained is not None:
            backbone.frames[trained].out.weight[0, 0] = 0.1
        before, state = (
            {name: t.clone() for name, t in backbone.state_dict().items()},
            torch.random.get_rng_state(),
        )
        backbone.renew_frames()
        after = backbone.state_dict()
        assert torch.equal(torch.random.get_rng_state(), state)
        changed = {
            ".".join(name.split(".")[:3])
            for name, t in after.items()
            if not torch.equal(t, before[name])
        }
        assert changed == {f"frames.{i}.wide" for i in range(2) if i != trained}
        found.append(after)
    wide = [after["frames.0.wide.weight"] for after in found]
    assert torch.equal(wide[0], wide[1]) and torch.equal(wide[0], wide[2])
    assert not torch.equal(wide[0], found[0]["frames.1.wide.weight"])
    bound = 15**-0.5  # of 5 channels and 3 taps: torch's Conv1d is uniform within it
    assert (
        0.8 * bound < wide[0].abs().max() <= bound
        and found[0]["frames.0.wide.bias"].abs().max() <= bound
    )


@torch.no_grad()
@pytest.mark.parametrize(("behind", "frame_layers"), [(0.0, 2), (0.7, 2), (0.7, 0)])
def test_a_row_gives_the_same_alone_and_padded(behind, frame_layers):
    backbone, sizes = build(frame_layers=frame_layers), (95, 7, 40, 0, 131)
    batch = waves(*sizes, behind=behind)
    found = backbone(batch, want=("latent",))
    assert found.tokens.shape == (5, 13, 5) and found.latent.shape == (5, 131, 5)
    for row, size in enumerate(sizes):
        count = conv_arithmetic.count(size, backbone.convolutions)
        assert count == size // 10 == int(found.mask[row].sum()) and found.mask[row, :count].all()
        assert (found.tokens[row, count:] == 0).all()
        one = Batch(
            np.arange(1),
            torch.arange(1),
            {
                "wave": batch["wave"][row : row + 1, :size],
                "mask": batch["mask"][row : row + 1, :size],
            },
        )
        alone = backbone(one, want=("latent",))
        assert (found.pooled[row] - alone.pooled[0]).abs().max() < 1e-5
        if size:
            assert (found.latent[row, :size] - alone.latent[0]).abs().max() < 1e-5
        if count:
            assert (found.tokens[row, :count] - alone.tokens[0, :count]).abs().max() < 1e-5
        else:
            assert (found.pooled[row] == 0).all()


def test_rows_without_samples_have_finite_gradients():
    backbone = build()
    for batch in (waves(0, 0), waves(0, 30)):
        found = backbone(batch, want=("latent",))
        (found.pooled.square().sum() + found.latent.square().sum()).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in backbone.parameters())


def test_levels_are_the_mu_law_of_256():
    backbone, all_levels = build(), torch.arange(256)
    assert torch.equal(backbone.levels(mu_law_decoding(all_levels, 256)[None])[0], all_levels)
    assert backbone.levels(torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]])).tolist() == [
        [0, 0, 128, 255, 255]
    ]


def test_recomputing_changes_memory_alone():
    kept, again = build(), build(recompute=True)
    grads = []
    for backbone in (kept, again):
        found = backbone(waves(60, 45), want=("latent",))
        (found.tokens.square().sum() + found.latent.square().sum()).backward()
        grads.append({name: p.grad for name, p in backbone.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_layers_are_in_order_and_hold_each_parameter_once():
    backbone = build(layers=6)
    layers = backbone.layers()
    assert list(layers) == [
        "embed",
        *[f"block{i:02d}" for i in range(12)],
        "norm",
        "frames00",
        "frames01",
    ]
    assert [name for names in layers.values() for name in names] == [
        name for name, _ in backbone.named_parameters()
    ]


def test_every_parameter_has_a_gradient_from_the_tokens():
    backbone = build()
    backbone(waves(60)).tokens.square().sum().backward()
    assert [
        name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ] == []


def test_bf16_stays_close_and_finite():
    backbone = build()
    batch = waves(200, 90)
    whole = backbone(batch).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backbone(batch, want=("latent",))
        found.pooled.square().sum().backward()
    assert (found.pooled - whole).abs().max() < 0.1 and found.latent.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_bundle_gives_the_same_backbone(tmp_path):
    backbone = build()
    bundle.save(str(tmp_path / "b"), backbone, ModalitySpec("audio", {}, {}))
    again = bundle.load(str(tmp_path / "b"))
    other = bundle.build_backbone(again.manifest.arch, seed=9).eval()
    assert bundle.transfer(other, again.backbone_tensors(), "b").new == ()
    assert (
        torch.equal(other(waves(60)).tokens, backbone(waves(60)).tokens)
        and other.convolutions == backbone.convolutions
    )


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (
            {"features": "mel", "rate": 16000, "channels": 80, "convolutions": [[400, 160, 0]]},
            {},
            "reads the samples of audio .features wave.; these rows are mel",
        ),
        ({"channels": 3, "size": 32}, {}, "these rows are channels, size"),
        (
            Audio(AudioOptions(normalize=True), {"features": "wave"}).inputs(),
            {},
            "scaled to variance 1: set normalize: false",
        ),
        (INPUTS, {"frame_kernel": 4}, "frame_kernel 4 must be odd"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=f"wavenet/wavenet.*{message}"):
        build(inputs, **options)


def test_tokens_cannot_be_left_out():
    with pytest.raises(ValueError, match="cannot leave tokens out"):
        build()(waves(60), token_mask=torch.zeros(1, 6, dtype=torch.bool))


def test_a_network_that_predicts_samples_goes_on_to_recognise_words(tmp_path):
    """Section 3.4: every weight of it is carried over, and learns from transcripts."""
    arch = Architecture("wavenet/wavenet", SMALL, INPUTS)
    learned = bundle.build_task(arch, ObjectiveSpec("next_sample", {}, {}), seed=1)
    learned.objective.after_training(learned.backbone)
    bundle.save(
        str(tmp_path / "source"),
        learned,
        ModalitySpec("audio", {}, {}),
        training={"transfer": ""},
        metrics={},
    )
    found = bundle.load(str(tmp_path / "source")).backbone_tensors()
    state = CTC.bind_to_backbone(
        CTC.fit(CTCOptions(), pa.table({"said": ["AB", "BA"]}), {"transcript": "said"}),
        learned.backbone,
    )
    task = bundle.build_task(arch, ObjectiveSpec("ctc", {}, state), seed=2)
    bundle.transfer(task.backbone, found, "the source")
    assert all(
        torch.equal(tensor, found[name]) for name, tensor in task.backbone.state_dict().items()
    )
    batch = waves(400, 300)
    batch.data.update(
        {
            "transcript": torch.tensor([[1, 2], [2, 1]], dtype=torch.int32),
            "transcript_lengths": torch.tensor([2, 2], dtype=torch.int32),
        }
    )
    optimizer, losses = torch.optim.Adam(task.parameters(), lr=1e-2), []
    for _ in range(30):
        total, count, _ = task(batch)
        losses.append(float((total / count).detach()))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    moved = {
        name.partition(".")[0]
        for name, tensor in task.backbone.state_dict().items()
        if not torch.equal(tensor, found[name])
    }
    assert losses[-1] < 0.5 * losses[0] and moved == {name.partition(".")[0] for name in found}, (
        losses
    )
