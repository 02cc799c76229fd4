"""wav2vec 2.0's objective: transformers' own loss on the same masks, distractors and noise; rows'
own randomness; collapse noticed; it learns.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from toys import task_of

from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import CouplesRows
from pipeline.core.rng import row_keys
from pipeline.objectives import wav2vec2

INPUTS = {"features": "wave", "rate": 16000, "channels": 1, "convolutions": []}
SIZES = {
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "conv_channels": 24,
    "conv_kernels": [10, 3, 3],
    "conv_strides": [5, 4, 4],
    "dropout": 0.0,
}
"""A frame each 80 samples: recordings of some thousand samples have enough frames to hide."""
SMALL = {"groups": 2, "entries": 12, "code_width": 16, "width": 20, "negatives": 15}
LENGTHS = (8000, 5000, 3200, 6400)


def task(options=None, seed: int = 0, **backbone):
    return task_of(
        "transformers/wav2vec2",
        INPUTS,
        "wav2vec2",
        options={**SMALL, **(options or {})},
        seed=seed,
        **{**SIZES, **backbone},
    )


def batch_of(lengths=LENGTHS, seed: int = 0, width: int = 0, first: int = 0) -> Batch:
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]
    waves = [
        torch.randn(length, generator=torch.Generator().manual_seed(seed + first + i))
        for i, length in enumerate(lengths)
    ]
    wave = torch.stack(
        [torch.nn.functional.pad(row, (0, mask.shape[1] - len(row))) for row in waves]
    )
    ids = np.arange(first, first + len(lengths))
    return Batch(
        ids, torch.from_numpy(row_keys(1, np.zeros_like(ids), ids)), {"wave": wave, "mask": mask}
    )


def scattered(made):
    """Contexts and codes that differ by more than at the start."""
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return made


def theirs(made, batch: Batch, monkeypatch, training: bool):
    """What transformers' Wav2Vec2ForPreTraining gives with the same weights, masks, distractors and
    noise.
    """
    o, objective = made.objective.options, made.objective
    config = hf.Wav2Vec2Config(
        **{
            **made.backbone.model.config.to_dict(),
            "num_codevectors_per_group": o.entries,
            "num_codevector_groups": o.groups,
            "codevector_dim": o.code_width,
            "proj_codevector_dim": o.width,
            "contrastive_logits_temperature": o.temperature,
            "diversity_loss_weight": o.diversity,
        }
    )
    model = hf.Wav2Vec2ForPreTraining(config).train(training)
    own = {f"wav2vec2.{name}": tensor for name, tensor in made.backbone.model.state_dict().items()}
    model.load_state_dict(
        own | {n: t for n, t in objective.state_dict().items() if n != "progress"}
    )
    spans = objective.spans(batch.keys, made.backbone.frame_mask(batch))
    places, valid = objective.hidden(spans)
    drawn = objective.distractors(batch.keys, valid)
    negatives, noise = (
        torch.zeros(*spans.shape, o.negatives, dtype=torch.long),
        torch.zeros(*spans.shape, o.groups, o.entries),
    )
    made_noise = objective.noise(batch.keys, places.shape[1])
    for row in range(len(batch)):
        for k in range(int(valid[row].sum())):
            negatives[row, places[row, k]] = row * spans.shape[1] + places[row][drawn[row, k]]
            noise[row, places[row, k]] = made_noise[row, k]

    def gumbel_softmax(logits, tau, hard):
        soft = ((logits + noise.view(logits.shape)) / tau).softmax(-1)
        assert hard
        return (
            torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            - soft.detach()
            + soft
        )

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    model.set_gumbel_temperature(float(objective.gumbel_temperature()))
    return model, model(
        batch["wave"],
        attention_mask=batch["mask"].long(),
        mask_time_indices=spans,
        sampled_negative_indices=negatives,
    )


@pytest.mark.parametrize("progress", [0.0, 0.7])
def test_the_loss_and_its_gradient_are_those_of_transformers(progress, monkeypatch):
    made, batch = scattered(task()), batch_of()
    made.train()
    made.objective.progress.fill_(progress)
    total, count, logs = made(batch)
    total.backward()
    model, want = theirs(made, batch, monkeypatch, training=True)
    want.loss.backward()
    assert (total / count).item() == pytest.approx((want.loss / count).item(), rel=1e-5)
    assert float(logs["contrastive"]) == pytest.approx(float(want.contrastive_loss), rel=1e-5)
    assert (
        float(logs["diversity"]) == pytest.approx(float(want.diversity_loss), rel=1e-5)
        and float(logs["diversity"] / count) > 0.2
    )
    assert float(logs["prob_perplexity"] / count) == pytest.approx(
        float(want.codevector_perplexity), rel=1e-5
    )
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, p in made.named_parameters():
        other = grads[name.replace("backbone.model.", "wav2vec2.").removeprefix("objective.")]
        assert other is not None and (p.grad - other).abs().max() < 1e-4 * max(
            1.0, float(other.abs().max())
        ), name


@torch.no_grad()
def test_evaluation_is_the_contrastive_loss_of_transformers(monkeypatch):
    """The likeliest entries, no noise."""
    made, batch = scattered(task()), batch_of()
    made.eval()
    _, want = theirs(made, batch, monkeypatch, training=False)
    total, count, _ = made(batch)
    assert float(total) == pytest.approx(float(want.contrastive_loss), rel=1e-5)
    rows = made.objective.predict(made.backbone, batch)
    assert (
        float(rows["loss"].sum()) == pytest.approx(float(total), rel=1e-6)
        and rows["count"].sum() == count
    )
    assert count == sum(
        int(row.sum()) for row in made.objective.spans(batch.keys, made.backbone.frame_mask(batch))
    )


@torch.no_grad()
def test_a_row_has_the_same_loss_in_any_batch():
    made = scattered(task()).eval()
    whole = made.objective.predict(made.backbone, batch_of())
    for row, length in enumerate(LENGTHS):
        alone = made.objective.predict(
            made.backbone, batch_of((length,), width=length + 3000 * row, first=row)
        )
        assert (
            float(alone["loss"]) == pytest.approx(float(whole["loss"][row]), rel=1e-5)
            and alone["count"] == whole["count"][row]
        )


# ---------------------------------------------------------------- masks, distractors, noise


def test_spans_are_whole_and_within_their_rows():
    objective = task().objective
    keys = torch.randint(-(2**62), 2**62, (400,), generator=torch.Generator().manual_seed(1))
    lengths = torch.randint(10, 300, (400,), generator=torch.Generator().manual_seed(2))
    real = torch.arange(300) < lengths[:, None]
    spans = objective.spans(keys, real)
    assert not (spans & ~real).any() and spans.any(1).all()
    for row in spans.tolist():
        runs = "".join("x" if hidden else " " for hidden in row).split()
        assert min(map(len, runs)) >= 10
    share = spans.sum() / real.sum()
    assert 0.45 < share < 0.52, "about 49 % of the frames, as the paper says"
    assert torch.equal(objective.spans(keys[5:9], real[5:9, :]), spans[5:9])
    longer = objective.spans(keys, torch.nn.functional.pad(real, (0, 50)))
    assert torch.equal(longer[:, :300], spans) and not longer[:, 300:].any()


def test_there_is_room_for_every_hidden_frame():
    """The number of places follows from the width alone."""
    keys = torch.randint(-(2**62), 2**62, (500,), generator=torch.Generator().manual_seed(3))
    for start, span in ((0.065, 10), (0.5, 3), (0.99, 2), (0.001, 25)):
        objective = task({"mask_start": start, "mask_length": span}).objective
        for n in (1, 9, 10, 31, 77, 200):
            spans = objective.spans(keys, torch.ones(500, n, dtype=torch.bool))
            places, valid = objective.hidden(spans)
            assert torch.equal(valid.sum(1), spans.sum(1)) and places.shape[1] <= n
            assert all(
                places[row][valid[row]].tolist() == spans[row].nonzero()[:, 0].tolist()
                for row in range(0, 500, 25)
            )


def test_distractors_are_other_hidden_frames_each_as_often():
    objective = task({"negatives": 4000}).objective
    valid = torch.arange(12) < torch.tensor([[9], [2], [1], [0]])
    drawn = objective.distractors(torch.tensor([11, 22, 33, 44]), valid)
    for row, count in ((0, 9), (1, 2)):
        for place in range(count):
            found = np.bincount(drawn[row, place].numpy(), minlength=12)
            assert found[place] == 0 and not found[count:].any()
            others = np.delete(found[:count], place)
            assert (np.abs(others - 4000 / (count - 1)) < 5 * np.sqrt(4000)).all()
    assert drawn.min() >= 0 and drawn.max() < 12


def test_the_noise_is_gumbels():
    noise = task().objective.noise(torch.arange(50) * 7919, 40).double().flatten()
    assert (
        torch.isfinite(noise).all()
        and abs(float(noise.mean()) - 0.5772) < 0.02
        and abs(float(noise.var()) - np.pi**2 / 6) < 0.05
    )


def test_the_choice_of_entries_sharpens_over_the_run():
    made = task()
    found = []
    for step in range(100):
        found.append(float(made.objective.gumbel_temperature()))
        made.objective.after_step(made.backbone, step, 100)
    assert found[0] == pytest.approx(2.0) and float(
        made.objective.gumbel_temperature()
    ) == pytest.approx(0.5)
    assert (
        np.allclose(np.diff(np.log(found)), np.log(0.25) / 100, atol=1e-5)
        and "progress" in made.objective.state_dict()
    ), "a resumed run goes on"


# ---------------------------------------------------------------- rows that are too short


def test_rows_that_are_too_short_take_no_part():
    made = scattered(task())
    made.train()
    short = batch_of((8000, 300, 0, 500))  # 2 to 5 frames, none
    total, count, logs = made(short)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters()) and all(
        torch.isfinite(value) for value in logs.values()
    )
    rows = made.eval().objective.predict(made.backbone, short)
    assert (
        rows["count"][0] == count > 0 and not rows["count"][1:].any() and not rows["loss"][1:].any()
    )


def test_a_batch_of_nothing_but_short_rows_gives_noughts():
    made = task({"feature_penalty": 1.0})
    made.train()
    total, count, _ = made(batch_of((300, 0)))
    total.backward()
    assert (
        total == 0
        and count == 0
        and all(p.grad is not None and not p.grad.any() for p in made.parameters())
    )


def test_a_single_hidden_frame_has_nothing_to_be_compared_with():
    made = task({"mask_length": 1, "mask_start": 0.001})
    rows = made.eval().objective.predict(made.backbone, batch_of())
    assert not rows["count"].any() and not rows["loss"].any()


# ---------------------------------------------------------------- training


def test_every_parameter_has_a_gradient():
    made = scattered(task({"feature_penalty": 1.0}))
    made.train()
    made(batch_of())[0].backward()
    assert [
        n
        for n, p in made.named_parameters()
        if p.grad is None or not p.grad.any() or not torch.isfinite(p.grad).all()
    ] == []


def test_the_feature_penalty_is_the_mean_square_of_the_convolutions():
    plain, with_penalty = scattered(task()), scattered(task({"feature_penalty": 3.0}))
    batch = batch_of()
    (a, count, _), (b, _, _) = plain.train()(batch), with_penalty.train()(batch)
    features = plain.backbone(batch, want=("convolved",))
    want = features.stages["convolved"][features.mask].square().mean()
    assert float((b - a) / count) == pytest.approx(3 * float(want), rel=1e-4)


def test_the_head_is_float32_under_autocast():
    made, batch = scattered(task()), batch_of()
    made.train()
    whole = made(batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, count, _ = made(batch)
    total.backward()
    assert total.dtype == torch.float32 and abs(float(total - whole)) < 0.02 * float(whole)
    assert all(torch.isfinite(p.grad).all() for p in made.parameters()) and count > 0


def test_code_usage_is_the_share_of_entries_that_were_chosen():
    """Counted one hidden frame after the other; evaluation, which counts no codes, says 0."""
    made, batch = scattered(task()).train(), batch_of()
    found = made.objective.compare(made.backbone, batch)
    chosen = {
        (group, int(found.logits[row, k, group].argmax()))
        for row, k in found.valid.nonzero().tolist()
        for group in range(2)
    }
    _, count, logs = made(batch)
    assert 2 < len(chosen) < 24 and float(logs["code_usage"] / count) == pytest.approx(
        len(chosen) / 24
    )
    assert made.eval()(batch)[2]["code_usage"] == 0


def test_codes_that_are_all_the_same_are_noticed_and_warned_of_once():
    made, batch = task({"diversity": 0.0}), batch_of()
    with torch.no_grad():
        made.objective.quantizer.weight_proj.weight.zero_()
        made.objective.quantizer.weight_proj.bias.zero_()[::12] = 50.0
    made.train()
    total, count, logs = made(batch)
    assert float(logs["code_perplexity"] / count) == pytest.approx(2.0) and float(
        logs["diversity"] / count
    ) == pytest.approx(1 - 2 / 24, abs=1e-3)
    assert float(logs["code_usage"] / count) == pytest.approx(2 / 24)
    assert total == 0 and logs["accuracy"] == 0, (
        "equal codes are no distractors: nothing is left to be told apart"
    )
    assert made.objective.after_step(made.backbone, 10, 100) is None, (
        "at first few entries may be in use"
    )
    message = made.objective.after_step(made.backbone, 50, 100)
    assert (
        "the quantiser has collapsed: at step 51 of 100 the perplexity of its codes is 1.0 of "
        "12 entries of a group" in message
    )
    assert made.objective.after_step(made.backbone, 55, 100) is None, "once"
    half = task({"diversity": 0.0})
    with torch.no_grad():
        half.objective.quantizer.weight_proj.weight[:12].zero_()
        half.objective.quantizer.weight_proj.bias[3] = 50.0
    half.train()
    assert float(half(batch)[2]["code_perplexity"]) > 6 * float(half(batch)[1]), (
        "the other group uses many"
    )
    assert "perplexity of its codes is 1.0 of 12 entries of a group" in half.objective.after_step(
        half.backbone, 50, 100
    )
    for entries in (2, 3, 12):
        sound = task({"entries": entries})
        sound.train()(batch)
        assert sound.objective.after_step(sound.backbone, 50, 100) is None, (
            "few entries cannot have a perplexity of three"
        )


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        (
            "transformers/bert",
            {"vocabulary": 30, "length": 8, "specials": [0, 1, 2, 3, 4]},
            {},
            "transformers/bert: wav2vec2 hides frames between convolutions and a context "
            "network, which takes transformers/wav2vec2, torchaudio",
        ),
        (
            "transformers/wav2vec2",
            INPUTS,
            {"code_width": 15},
            "wav2vec2.code_width 15 must be a multiple of wav2vec2.groups 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(
            name, inputs, "wav2vec2", options={**SMALL, **options}, layers=1, hidden=16, heads=2
        )


def loss_and_gradient(ranks, rows_of_ranks: list[list[int]]) -> dict:
    """One rank's part of the same global batch; it may be empty."""
    made = scattered(task({"feature_penalty": 0.5}))
    made.train()
    own, whole = rows_of_ranks[ranks.rank], batch_of()
    part = Batch(
        whole.rows[own], whole.keys[own], {name: tensor[own] for name, tensor in whole.data.items()}
    )
    total, n, logs = made(part)
    total.backward()
    return {
        "total": total.detach(),
        "count": n,
        "logs": {name: torch.as_tensor(value).detach() for name, value in logs.items()},
        "grads": {name: p.grad for name, p in made.named_parameters()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("rows_of_ranks", [[[0, 1, 2], [3]], [[0, 1, 2, 3], []]])
def test_ranks_together_have_the_loss_and_the_gradient_of_the_global_batch(team, rows_of_ranks):
    parts = team(loss_and_gradient, rows_of_ranks)
    made = scattered(task({"feature_penalty": 0.5}))
    made.train()
    total, count, logs = made(batch_of())
    total.backward()
    assert sum(part["count"] for part in parts) == count
    assert sum(part["total"] for part in parts).item() == pytest.approx(total.item(), rel=1e-5)
    for name, value in logs.items():
        assert float(
            sum(part["logs"].get(name, torch.zeros(())) for part in parts)
        ) == pytest.approx(float(value), rel=1e-5), name
    for name, p in made.named_parameters():
        assert (sum(part["grads"][name] for part in parts) - p.grad).abs().max() < 1e-4 * max(
            1.0, float(p.grad.abs().max())
        ), name


@pytest.mark.slow
@pytest.mark.data
def test_a_few_steps_lower_the_loss_on_real_speech():
    """Forty steps on 32 recordings of an4, cut to 3 s: the paper's convolutions, a small context
    network. Guessing has an accuracy of 1 in 21; a loss that falls because all codes are the same
    would be warned of.
    """
    import pyarrow.parquet as pq
    import soundfile

    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA is not set")
    cells = (
        pq.read_table(Path(os.environ["ONETOMANY_DATA"], "speech", "an4", "train.parquet"))
        .slice(0, 32)["audio"]
        .to_pylist()
    )
    files = [io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell) for cell in cells]
    waves = [torch.from_numpy(soundfile.read(file, dtype="float32")[0])[:48000] for file in files]
    waves = [(wave - wave.mean()) / (wave.std() + 1e-4) for wave in waves]
    made = task(
        {"entries": 40, "code_width": 32, "width": 32, "negatives": 20, "diversity": 0.2},
        hidden=64,
        conv_channels=48,
        conv_kernels=None,
        conv_strides=None,
    )
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-4)
    losses, accuracies = [], []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, (step + 1) / 10)
        ids = np.arange(step * 8, step * 8 + 8) % len(waves)
        rows = [waves[i] for i in ids]
        mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
        keys = torch.from_numpy(row_keys(0, np.full_like(ids, step), ids))
        total, count, logs = made(
            Batch(
                ids,
                keys,
                {"wave": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "mask": mask},
            )
        )
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert made.objective.after_step(made.backbone, step, 40) is None
        losses.append(float(logs["contrastive"] / count))
        accuracies.append(float(logs["accuracy"] / count))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]) and np.mean(
        accuracies[-5:]
    ) > 2 * np.mean(accuracies[:5]), (losses, accuracies)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("torchaudio/deepspeech2", {"layers": 1, "hidden": 16, "channels": 12, "kernels": [5, 3]}),
        (
            "torchaudio/conformer",
            {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 24, "kernel": 7, "channels": 3},
        ),
    ],
)
def test_networks_over_log_mels_learn_by_it(name, sizes):
    """One row's mels over and over: the loss falls, each parameter of the backbone has a gradient,
    and rows do not depend on the batch around them.
    """
    inputs = {"features": "mel", "rate": 16000, "channels": 12, "convolutions": [[400, 160, 0]]}
    made = task_of(
        name, inputs, "wav2vec2", options={**SMALL, "mask_length": 4}, seed=0, dropout=0.0, **sizes
    )
    lengths = torch.tensor([160, 90])
    mask = torch.arange(160) < lengths[:, None]
    mel = (
        torch.randn(2, 160, 12, generator=torch.Generator().manual_seed(0)).cumsum(1)
        * mask[:, :, None]
    )
    batch = Batch(
        np.arange(2),
        torch.from_numpy(row_keys(1, np.zeros(2, dtype=np.int64), np.arange(2))),
        {"mel": mel / 10, "mask": mask},
    )
    found = made.eval().objective.predict(made.backbone, batch)
    alone = made.objective.predict(
        made.backbone,
        Batch(batch.rows[1:], batch.keys[1:], {"mel": mel[1:, :90] / 10, "mask": mask[1:, :90]}),
    )
    assert found["count"][1] == alone["count"][0] > 4 and found["loss"][1].item() == pytest.approx(
        alone["loss"][0].item(), rel=1e-4
    )
    made.train()
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=3e-3), []
    for _ in range(30):
        total, count, logs = made(batch)
        (total / count).backward()
        assert losses or all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in made.backbone.parameters()
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(logs["contrastive"] / count))
    assert losses[-1] < 0.8 * losses[0], losses


def test_wav2vec2_reads_no_labels():
    assert wav2vec2.Wav2Vec2Pretraining.roles == () and isinstance(
        wav2vec2.Wav2Vec2Pretraining, CouplesRows
    )
