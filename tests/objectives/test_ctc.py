"""CTC: rows that are refused, the loss against a loop and against torch in float64, decoding
against every path there is, words in time.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import extras, registry
from pipeline.core.contracts import Backbone, Batch, Features, RawRows, Task
from pipeline.core.metrics.catalog import metric
from pipeline.core.nn import conv_arithmetic
from pipeline.core.ragged import ragged
from pipeline.core.specs import Architecture
from pipeline.data import manifests
from pipeline.data.loader import Decoder
from pipeline.data.stream import Rows, TooManyBadRowsError
from pipeline.media import audio_io, language_model, transcripts
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.objectives import ctc
from pipeline.objectives.ctc import CTC, CTCOptions
from pipeline.train import evaluate, source

COLUMNS = {"audio": "sound", "transcript": "said"}
MEL = [[400, 160, 0]]


class Known(Backbone):
    """Gives its input ``mel`` (B, N, F) as tokens: a head that is the identity makes them the
    emissions.
    """

    def __init__(self, width: int, convolutions=MEL):
        nn.Module.__init__(self)
        self.token_dim, self.pooled_dim, self.convolutions = width, width, convolutions
        self.arch = Architecture("toys/known", {}, {"features": "mel", "rate": 16000})

    def forward(self, batch, *, token_mask=None, want=()):
        x, mask = batch["mel"], batch["mask"]
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return Features((x * share[..., None]).sum(1), x, mask)

    def layers(self):
        return {}


def fitted(transcripts=("AB CA", "BB"), **options):
    return CTC.fit(CTCOptions(**options), pa.table({"said": list(transcripts)}), COLUMNS)


def task_of(state=None, width: int | None = None, **options) -> Task:
    state = state or fitted()
    backbone = Known(width or len(state["labels"]))
    objective = CTC(backbone, CTCOptions(**options), CTC.bind_to_backbone(state, backbone))
    if width is None:
        with torch.no_grad():
            objective.head.weight.copy_(torch.eye(len(state["labels"])))
            objective.head.bias.zero_()
    return Task(backbone, objective).eval()


def batch_of(mels, labels=None) -> Batch:
    """Recordings (N, F) and their labels, padded: what lies behind a recording is noise, as no one
    should look there.
    """
    ends = torch.tensor([len(mel) for mel in mels])
    noise = torch.Generator().manual_seed(5)
    x = torch.randn(len(mels), int(ends.max()), mels[0].shape[1], generator=noise) * 9
    for i, mel in enumerate(mels):
        x[i, : len(mel)] = mel
    data = {"mel": x, "mask": torch.arange(x.shape[1]) < ends[:, None]}
    if labels is not None:
        counts = torch.tensor([len(row) for row in labels])
        data["transcript"] = torch.zeros(len(mels), max(1, int(counts.max())), dtype=torch.int32)
        for i, row in enumerate(labels):
            data["transcript"][i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        data["transcript_lengths"] = counts
    return Batch(np.arange(len(mels)), torch.arange(len(mels)), data)


def random_rows(n: int = 12, width: int = 5, seed: int = 0, labels: int = 5):
    rng = torch.Generator().manual_seed(seed)
    mels = [
        torch.randn(int(torch.randint(9, 20, (), generator=rng)), width, generator=rng)
        for _ in range(n)
    ]
    said = [
        torch.randint(
            1, labels, (int(torch.randint(1, 5, (), generator=rng)),), generator=rng
        ).tolist()
        for _ in range(n)
    ]
    return mels, said


def every_text(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The logarithm of each text's probability, over all paths, of emissions (N, C)."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(label for label, _ in itertools.groupby(path) if label)
        score = sum(float(log_probs[i, label]) for i, label in enumerate(path))
        found[text] = float(np.logaddexp(found.get(text, -math.inf), score))
    return found


# ---------------------------------------------------------------- columns


def test_the_state_says_how_texts_were_normalised_and_what_the_labels_are():
    state = fitted(["it’s  a", "Bé!", None])
    assert (
        state["labels"] == ["<blank>", " ", "'", "A", "B", "I", "S", "T", "É"]
        and state["normalization"] == "apostrophe nfkc upper no_punctuation spaces"
    )
    assert json.loads(json.dumps(state)) == state
    assert fitted(["Ab!"], case="keep", punctuation="keep")["labels"] == ["<blank>", "!", "A", "b"]
    subwords = fitted(["she sells sea shells"] * 9, units="subwords", vocabulary=20)
    assert (
        len(subwords["labels"]) <= 20
        and "▁SHE" in "".join(subwords["labels"])
        and subwords["units"] == "subwords"
    )
    with pytest.raises(
        ValueError,
        match="column said, the transcripts of 1 training rows: they hold 600 different "
        "characters, more than 500",
    ):
        fitted(["".join(map(chr, range(0x4E00, 0x4E00 + 600)))])
    with pytest.raises(ValueError, match="column said holds int64: transcripts are texts"):
        CTC.fit(CTCOptions(), pa.table({"said": [1, 2]}), COLUMNS)
    with pytest.raises(
        ValueError, match="column said, the transcripts of 2 training rows: they hold no character"
    ):
        fitted([None, " ?"])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_rows_whose_transcript_cannot_be_used_have_a_reason_each(kind):
    table = pa.table(
        {"said": pa.array(["ab, ca", None, " ?! ", "aéb7 é", "bb"], pa.string()).cast(kind)}
    )
    state = fitted()
    assert CTC.invalid_label_reasons(table, COLUMNS, state) == [
        "",
        "the transcript is empty",
        "the transcript is empty",
        "",
        "",
    ]
    heard = {"audio": ragged([np.zeros(16000, dtype=np.int16)] * 5)}
    suited = CTC.bind_to_backbone(state, Known(4))
    assert CTC.untrainable_reasons(table, COLUMNS, suited, heard) == [
        "",
        "",
        "",
        "no training transcript holds '7' (1x), 'É' (2x)",
        "",
    ]
    labels = CTC.encode(table, COLUMNS, state)["transcript"]
    assert (
        labels.dtype == object
        and [row.tolist() for row in labels] == [[2, 3, 1, 4, 2], [], [], [], [3, 3]]
        and labels[0].dtype == np.int32
    )
    new = pa.table({"sound": ["a", "b"]})
    assert CTC.encode(new, COLUMNS, state) == {} and CTC.invalid_label_reasons(
        new, COLUMNS, state
    ) == ["", ""]


def test_more_labels_than_frames_are_found_before_training():
    state = CTC.bind_to_backbone(fitted(["AB", "C" * 9]), Known(4))
    assert (state["convolutions"], state["rate"]) == (MEL, 16000) and conv_arithmetic.count(
        1200, MEL
    ) == 6
    labels = [[1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3, 1], [3, 3, 3, 3], [], [1, 1, 1]]
    samples = np.array([1200, 1200, 1200, 300, 0])
    arrays = {"audio": ragged(np.zeros(n, dtype=np.int16) for n in samples)}
    table = pa.table({"said": ["".join(state["labels"][one] for one in row) for row in labels]})
    reasons = [
        "",
        "the transcript's 7 labels need 7 frames, the recording has 6",
        "the transcript's 4 labels need 7 frames, the recording has 6",
        "",
        "",
    ]
    assert CTC.untrainable_reasons(table, COLUMNS, state, arrays) == reasons
    assert CTC.untrainable_reasons(pa.table({"sound": ["a"]}), COLUMNS, state, arrays) == [""]
    assert CTC.untrainable_reasons(table, COLUMNS, state, None, samples / 16000) == [""] * 5, (
        "what is close is left to the samples"
    )
    long = pa.table({"said": ["AB" * 60] * 3})
    assert [
        bool(reason)
        for reason in CTC.untrainable_reasons(
            long, COLUMNS, state, None, np.array([1.1, 0.0, 1.25])
        )
    ] == [True, False, False]
    log_probs, count = torch.randn(1, 6, 4).log_softmax(-1), torch.tensor
    # Torch agrees where there is no alignment
    for row, reason in zip(labels[:3], reasons, strict=False):
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([row]),
            count([6]),
            count([len(row)]),
            reduction="none",
        )
        assert bool(loss.isinf()) == bool(reason)


def recording(seconds: float) -> bytes:
    soundfile.write(
        sink := io.BytesIO(),
        np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)),
        16000,
        format="FLAC",
    )
    return sink.getvalue()


@pytest.mark.parametrize("message", [True, False])
def test_rows_that_cannot_be_learned_from_are_left_out_before_any_is_decoded(
    message, tmp_path, monkeypatch
):
    """By their headers, where the column of seconds is rounded and leaves it open; one that is
    clear by it is not opened.
    """
    rows = [
        (recording(0.9), 1.0, "AB"),
        (recording(0.9), 1.0, "AB" * 46),
        (recording(1.4), 1.0, "AB" * 60),
        (recording(20.0), 20.0, "AB" * 60),
        (recording(0.5), 1.0, "Z"),
        (b"", 0.1, "AB" * 90),
        (b"", None, "A"),
    ]
    pq.write_table(
        pa.table(dict(zip(("sound", "long", "said"), zip(*rows, strict=True), strict=True))),
        tmp_path / "rows.parquet",
    )
    state, opened, inspect = CTC.bind_to_backbone(fitted(["AB"]), Known(4)), [], audio_io.inspect
    decoder = Decoder(
        Audio(AudioOptions(), {"features": "mel"}),
        "ctc",
        state,
        {"audio": "sound", **COLUMNS, **({"seconds": "long"} if message else {})},
    )
    rows = Rows(
        manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))),
        decoder,
    ).with_costs(cpus=0)

    def noted(file):
        opened.append(len(file))
        return inspect(file)

    monkeypatch.setattr(audio_io, "inspect", noted)
    left, bad = source.drop_untrainable(rows, 0.5)
    assert not message or len(recording(20.0)) not in opened
    reasons = {
        1: "the transcript's 92 labels need 92 frames, the recording has 90",
        4: "no training transcript holds 'Z' (1x)",
        **(
            {5: "the transcript's 180 labels need 180 frames, the recording has 111"}
            if message
            else {}
        ),
    }
    assert dict(bad) == reasons and left.costs.tolist() == [
        rows.costs[i] for i in range(7) if i not in reasons
    ]
    with pytest.raises(TooManyBadRowsError, match=f"{len(reasons)} of 7 rows cannot be used"):
        source.drop_untrainable(rows, 0.25)


def test_a_piece_of_a_recording_is_as_long_as_told(tmp_path):
    rows = {
        "sound": [recording(3.0)] * 3,
        "from": [0.5, None, 2.0],
        "long": [1.0, 1.0, 1.0],
        "said": ["AB" * 60] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    decoder = Decoder(
        Audio(AudioOptions(), {"features": "mel"}),
        "ctc",
        CTC.bind_to_backbone(fitted(["AB"]), Known(4)),
        {"audio": "sound", **COLUMNS, "seconds": "long", "start": "from"},
    )
    rows = Rows(
        manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))),
        decoder,
    ).with_costs(cpus=0)
    assert [row for row, _ in source.drop_untrainable(rows, 1.0)[1]] == [0, 2], (
        "the whole recording has 298 frames"
    )


def test_transcripts_are_read_again_without_their_recordings(tmp_path):
    """For the errors of each validation."""
    pq.write_table(
        pa.table({"sound": [b"sound"] * 3, "said": ["AB", "B", "A"], "other": [1, 2, 3]}),
        tmp_path / "rows.parquet",
    )
    decoder = Decoder(
        Audio(AudioOptions(), {"features": "mel"}), "ctc", {}, {"audio": "sound", **COLUMNS}
    )
    rows = Rows(
        manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))),
        decoder,
    )
    assert set(decoder.column_names()) == {"sound", "said"}
    assert evaluate.Postprocessor(rows).raw_rows(
        task_of(width=4).objective, np.array([2, 0])
    ).table.to_pydict() == {"said": ["A", "AB"]}


def test_a_backbone_that_hears_nothing_is_refused():
    class Blind(Known):
        pass

    blind = Blind(4, None)
    for refuse in (
        lambda: CTC.bind_to_backbone(fitted(), blind),
        lambda: CTC(blind, CTCOptions(), fitted()),
    ):
        with pytest.raises(
            ValueError,
            match=r"toys/known gives no frames of a recording: ctc needs a backbone of speech "
            r"\(torchaudio/deepspeech, ",
        ):
            refuse()
    entry = registry.entry("objective", "ctc")
    assert (
        entry.roles == ("transcript",)
        and {"wer", "cer", "loss"} <= registry.entries("metric").keys()
    )


@pytest.mark.data
@pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="ONETOMANY_DATA names no folder of data sets"
)
def test_an4s_transcripts_are_read_as_they_are():
    folder = Path(os.environ["ONETOMANY_DATA"], "speech/an4")
    train, test = (
        pq.read_table(folder / f"{split}.parquet", columns=["transcript", "duration_s"])
        for split in ("train", "test")
    )
    columns = {"transcript": "transcript"}
    state = CTC.bind_to_backbone(
        CTC.fit(CTCOptions(), train, columns), Known(4, [*MEL, [11, 2, 5], [11, 2, 5]])
    )
    assert "".join(state["labels"][1:]) == " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for table in (train, test):
        assert not any(CTC.invalid_label_reasons(table, columns, state))
        labels = CTC.encode(table, columns, state)["transcript"]
        alphabet = transcripts.Alphabet.from_state(state)
        assert [alphabet.decode(row) for row in labels] == [
            " ".join(text.split()) for text in table["transcript"].to_pylist()
        ]
        audio = ragged(
            np.zeros(int(16000 * seconds), dtype=np.int8)
            for seconds in table["duration_s"].to_pylist()
        )
        assert CTC.untrainable_reasons(table, columns, state, {"audio": audio}) == [""] * len(table)


# ---------------------------------------------------------------- loss


def test_the_loss_is_that_of_each_recording_by_itself():
    mels, said = random_rows()
    task = task_of(width=5, dropout=0.3, convolutions=2, norm=True)
    total, count, logs = task(batch_of(mels, said))
    alone = [task(batch_of([mel], [labels]))[0] for mel, labels in zip(mels, said, strict=True)]
    assert (
        abs(float((total - torch.stack(alone).sum()).detach())) < 1e-5 * len(mels)
        and count == sum(map(len, said))
        and logs["dropped"] == 0
    )
    plain = task_of()
    total, count, _ = plain(batch_of(mels, said))
    wanted = [
        F.ctc_loss(
            mel.double().log_softmax(-1)[:, None],
            torch.tensor([labels]),
            torch.tensor([len(mel)]),
            torch.tensor([len(labels)]),
            reduction="sum",
        )
        for mel, labels in zip(mels, said, strict=True)
    ]
    assert abs(float(total.detach().double() - torch.stack(wanted).sum())) < 1e-5 * len(mels)


def test_the_loss_is_minus_the_logarithm_of_the_sum_over_all_paths():
    mel = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    found = every_text(mel.log_softmax(-1))
    state = {**fitted(), "labels": ["<blank>", "A", "B"], "characters": "AB"}
    for text in ((1,), (1, 1), (2, 1, 2), (1, 2, 2)):
        assert (
            abs(float(task_of(state)(batch_of([mel], [list(text)]))[0].detach()) + found[text])
            < 1e-5
        )


def test_padding_changes_neither_loss_nor_gradient_nor_text():
    mels, said = random_rows(4)
    task = task_of(width=5, convolutions=2)
    both = []
    for longer in (0, 40):
        batch = batch_of([*mels, torch.randn(20 + longer, 5)], [*said, [1]])
        batch = Batch(
            batch.rows[:4],
            batch.keys[:4],
            {name: tensor[:4] for name, tensor in batch.data.items()},
        )
        task.zero_grad()
        total, *_ = task(batch)
        total.backward()
        text = task.objective.predict(task.backbone, batch)["prediction"]
        both.append((total.detach(), {n: p.grad.clone() for n, p in task.named_parameters()}, text))
    assert torch.allclose(both[0][0], both[1][0], atol=1e-5) and torch.equal(both[0][2], both[1][2])
    assert (
        all((both[0][1][name] - grad).abs().max() < 1e-5 for name, grad in both[1][1].items())
        and both[0][1]["objective.head.weight"].abs().max() > 1e-3
    )


def test_a_row_without_alignment_counts_for_nothing_and_is_reported():
    mels, said = random_rows(3)
    task = task_of(width=5)
    mels, said = [*mels, torch.randn(3, 5)], [*said, [2, 2]]  # its blank too has a frame
    whole = task(batch_of(mels, said))
    mels, said = [*mels, torch.randn(2, 5), torch.randn(2, 5)], [*said, [1, 2, 3, 4], [2, 2]]
    total, count, logs = task(batch_of(mels, said))
    assert (
        torch.allclose(total, whole[0], atol=1e-5)
        and count == whole[1] == sum(map(len, said[:4]))
        and logs["dropped"] == 6
    )
    total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in task.parameters())
    batch = batch_of(mels, said)
    nothing = batch.replace(mask=torch.zeros_like(batch["mask"]))
    total, count, logs = task(nothing)
    assert (total, count, logs["dropped"]) == (0, 0, sum(map(len, said)))
    assert task.objective.predict(task.backbone, nothing)["prediction"].shape == (6, 0)
    new = Batch(nothing.rows, nothing.keys, {name: nothing[name] for name in ("mel", "mask")})
    found = task.objective.predict(task.backbone, new)
    assert (
        found["first"].shape == found["last"].shape == (6, 0) and found["confidence"].isnan().all()
    )
    empty = nothing.replace(mel=batch["mel"][:, :0], mask=batch["mask"][:, :0])
    assert task(empty)[0] == 0 and task.objective.predict(task.backbone, empty)[
        "prediction"
    ].shape == (6, 0)


def test_the_loss_is_in_float32_under_bf16():
    mels, said = random_rows()
    task = task_of()
    wanted = task(batch_of(mels, said))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert task.objective.emissions(task.backbone, batch_of(mels))[0].dtype == torch.float32
        total = task(batch_of(mels, said))[0]
    # The head alone was rounded
    assert total.dtype == torch.float32 and 0 < abs(
        float((total - wanted).detach())
    ) < 0.02 * float(wanted.detach())


def test_convolutions_hear_their_neighbours_alone():
    task = task_of(width=5, convolutions=2)
    with torch.no_grad():  # no rectifier holds anything back
        for p in task.objective.convolutions.parameters():
            p.abs_()
    mel = torch.rand(20, 5)
    plain, _ = task.objective.emissions(task.backbone, batch_of([mel]))
    other = mel.clone()
    other[10] += 1
    heard = (task.objective.emissions(task.backbone, batch_of([other]))[0] - plain).abs().sum(-1)[
        0
    ] > 0
    assert heard.nonzero()[:, 0].tolist() == [8, 9, 10, 11, 12]
    assert set(task.layers()["head"]) == {
        f"objective.{part}.{kind}"
        for part in ("convolutions.0", "convolutions.1", "head")
        for kind in ("weight", "bias")
    }


# ---------------------------------------------------------------- decoding


def test_greedy_takes_runs_once_and_leaves_blanks_out():
    paths = [[0, 1, 1, 0, 1, 2, 2, 0], [1, 2, 3, 3, 0, 0, 4, 4], [0, 0, 0], []]
    mels = [
        F.one_hot(torch.tensor(path, dtype=torch.long), 5).float().reshape(-1, 5) * 9
        for path in paths
    ]
    out = task_of().objective.predict(Known(5), batch_of(mels))
    assert (
        out["prediction"].tolist() == [[1, 1, 2, -1], [1, 2, 3, 4], [-1] * 4, [-1] * 4]
        and out["prediction"].dtype == torch.int32
    )


def test_metrics_are_those_of_the_rows_own_transcripts():
    task = task_of()
    said = ["AB CA", "bb.", "A", "c a b"]
    paths = [[2, 3, 1, 4, 2], [3, 0, 2], [0], [4, 1, 2, 1, 3]]
    mels = [F.one_hot(torch.tensor(path), 5).float() * 9 for path in paths]
    table = pa.table({"sound": ["x"] * 4, "said": said})
    labels = [
        row.tolist() for row in CTC.encode(table, COLUMNS, task.objective.state)["transcript"]
    ]
    found = {
        name: tensor.detach().numpy()
        for name, tensor in task.objective.predict(task.backbone, batch_of(mels, labels)).items()
    }
    assert set(found) == {"prediction", "loss", "count"} and found["count"].tolist() == [5, 2, 1, 5]
    total, count, _ = task(batch_of(mels, labels))
    assert np.allclose(found["loss"].sum(), total.detach()) and found["count"].sum() == count
    # type: ignore[arg-type]
    whole = task.objective.postprocess(found, RawRows(table, COLUMNS, None))
    theirs, ours = ["AB CA", "BB", "A", "C A B"], ["AB CA", "BA", "", "C A B"]
    assert metric("wer").value(whole) == jiwer.wer(theirs, ours) and metric("cer").value(
        whole
    ) == jiwer.cer(theirs, ours)
    assert (
        not metric("wer").higher_is_better
        and whole["word_errors"].tolist() == [0, 1, 1, 0]
        and whole["chars"].tolist() == [5, 2, 1, 5]
    )
    # type: ignore[arg-type]
    assert (
        task.objective.postprocess(found, RawRows(table.select(["sound"]), COLUMNS, None)) is found
    )
    assert metric("bits_per_sample").value(
        {"loss": np.array([math.log(2) * 6, 0.0]), "count": np.array([2, 1])}
    ) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (["AB CA", "BB"], "wer"),
        (["ONE", "TWO"], "wer"),  # single words
        (["今天天气很好", "再看一次"], "cer"),
        (["今天 天气 很 好"], "wer"),
        (
            ["我 用 OK", "北京 上海", "今天天气很好", "再看一次"],
            "cer",
        ),  # few spaces, around OK or for a dash
        (["ดีมาก"], "cer"),
    ],
)
def test_the_first_metric_is_that_of_characters_where_no_space_is_between_words(said, first):
    state = fitted(said)
    for metrics in (CTC.target_metrics(CTCOptions(), state), CTC.source_metrics(None, state)):
        assert metrics[0] == first and set(metrics) == {"wer", "cer", "loss"}


def searched(task: Task, mels) -> list[tuple[int, ...]]:
    found = task.objective.predict(task.backbone, batch_of(mels))["prediction"]
    return [tuple(row[row >= 0].tolist()) for row in found]


@pytest.mark.usefixtures("beam_search")
@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_likeliest_text_of_all(seed):
    mels = [
        torch.randn(n, 4, generator=torch.Generator().manual_seed(10 * seed + n)) for n in (1, 3, 5)
    ]
    state = fitted(["A B"])
    for mel, found in zip(mels, searched(task_of(state, beam=3000), mels), strict=True):
        ranked = every_text(mel.log_softmax(-1))
        assert found == max(ranked, key=ranked.__getitem__)


@pytest.mark.usefixtures("beam_search")
def test_a_beam_is_at_least_as_good_as_greedy():
    mels, _ = random_rows(40, seed=3)
    better = 0
    for mel, wide, greedy in zip(
        mels, searched(task_of(beam=50), mels), searched(task_of(), mels), strict=True
    ):
        wide, greedy = (
            -float(
                ctc.ctc_losses(
                    mel[None].log_softmax(-1),
                    torch.tensor([len(mel)]),
                    torch.tensor([list(text) or [0]]),
                    torch.tensor([len(text)]),
                )[0]
            )
            for text in (wide, greedy)
        )
        assert wide >= greedy - 1e-4
        better += wide > greedy + 1e-4
    assert better > 10


ARPA = """\\data\\
ngram 1=7
ngram 2=3

\\1-grams:
-99\t<s>\t-0.3
-1.2\t</s>
-2.5\t<unk>
-0.7\tA\t-0.4
-0.9\tB\t-0.2
-0.8\t|\t-0.1
-1.5\tC

\\2-grams:
-0.2\tA B
-1.9\tB B
-0.3\t<s> B

\\end\\
"""


def arpa_score(names: list[str]) -> float:
    """Logarithm, base 10, of a sentence with its end under ``ARPA`` (Katz back-off)."""
    one = {"</s>": -1.2, "A": -0.7, "B": -0.9, "|": -0.8, "C": -1.5}
    back, two = (
        {"A": -0.4, "B": -0.2, "|": -0.1, "C": 0.0, "<s>": -0.3},
        {("A", "B"): -0.2, ("B", "B"): -1.9, ("<s>", "B"): -0.3},
    )
    total = 0.0
    for before, name in itertools.pairwise(["<s>", *names, "</s>"]):
        total += two.get((before, name), back[before] + one[name])
    return total


@pytest.mark.usefixtures("beam_search")
def test_a_language_model_and_words_are_weighed_as_they_say(tmp_path):
    path = tmp_path / "labels.arpa"
    path.write_text(ARPA)
    state = fitted(["A B"])
    changed = 0
    for seed in range(12):
        mel = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        ranked = every_text(mel.log_softmax(-1))
        for weight, bonus in ((1.5, 0.0), (0.7, 2.0)):

            def score(text, ranked=ranked, weight=weight, bonus=bonus):
                said = "".join(" AB"[label - 1] for label in text)
                return (
                    ranked[text]
                    + weight * arpa_score([{" ": "|"}.get(c, c) for c in said])
                    + bonus * len(said.split())
                )

            best = max(ranked, key=score)
            changed += best != max(ranked, key=ranked.__getitem__)
            assert searched(
                task_of(state, beam=3000, lm=str(path), lm_weight=weight, word_score=bonus), [mel]
            ) == [best]
    assert changed > 4


@pytest.mark.usefixtures("beam_search")
def test_a_language_model_is_the_one_that_was_fitted(tmp_path, monkeypatch):
    """The state holds a small file, and of a large one what tells it from another."""
    path = tmp_path / "labels.arpa"
    path.write_text(ARPA)
    options = {"beam": 100, "lm": str(path), "lm_weight": 1.5}
    mels = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    small = json.loads(json.dumps(fitted(["A B"], **options)))
    right = searched(task_of(small, **options), mels)
    monkeypatch.setattr(language_model, "HELD_BYTES", 100)
    large = json.loads(json.dumps(fitted(["A B"], **options)))
    assert searched(task_of(large, **options), mels) == right
    assert large["lm"] == {"sha256": small["lm"]["sha256"], "content": None}

    path.write_text(ARPA.replace("-0.2\tA B", "-9.2\tA B"))
    ctc.beam_search_decoder.cache_clear()
    assert searched(task_of(small, **options), mels) == right
    changed = hashlib.sha256(path.read_bytes()).hexdigest()
    trained_with = large["lm"]["sha256"]
    message = f"labels.arpa is not the file .*: its SHA-256 is {changed}, .* {trained_with}; put"
    with pytest.raises(ValueError, match=message):
        task_of(large, **options)

    path.unlink()
    ctc.beam_search_decoder.cache_clear()
    assert searched(task_of(small, **options), mels) == right
    with pytest.raises(ValueError, match=r"there is no file \S+labels.arpa on this machine, and"):
        task_of(large, **options)


@pytest.mark.usefixtures("beam_search")
def test_beam_search_that_cannot_be_made_is_refused_at_once(tmp_path):
    path = tmp_path / "words.arpa"
    path.write_text(ARPA.replace("A", "HELLO").replace("B", "WORLD").replace("|", "THE"))
    with pytest.raises(
        ValueError,
        match=r"words.arpa does not know 4 of 4 labels \(\|, A, B, C\): it must be a model of the "
        r"labels|does not know 3 of 4",
    ):
        task_of(beam=5, lm=str(path))
    with pytest.raises(
        ValueError, match=r"objective.lm: there is no file .*nothing.arpa on this machine"
    ):
        task_of(beam=5, lm=str(tmp_path / "nothing.arpa"))
    (tmp_path / "bad.arpa").write_text("no model")
    with pytest.raises(ValueError, match=r"bad.arpa is not readable as a language model"):
        task_of(beam=5, lm=str(tmp_path / "bad.arpa"))
    with pytest.raises(
        ValueError, match=r"lm: a language model takes part in beam search alone: set beam"
    ):
        task_of(lm=str(path))


def test_beam_search_without_its_library_is_refused_at_once(monkeypatch):
    ctc.beam_search_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "beam search needs flashlight-text, which is not installed: "
            f"{extras.install('speech')}, or set beam: 0"
        ),
    ):
        task_of(beam=5)


# ---------------------------------------------------------------- time


def test_words_stand_where_they_were_said():
    task = task_of()
    path = [0] * 4 + [2, 2, 0, 3] + [0] * 3 + [1] + [0] * 2 + [4, 0, 0, 4, 4] + [0] * 5
    mels = [F.one_hot(torch.tensor(one), 5).float() * 12 for one in (path, [0, 0], [3, 0, 3, 1])]
    found = {
        name: tensor.detach().numpy()
        for name, tensor in task.objective.predict(task.backbone, batch_of(mels)).items()
    }
    assert found["first"].tolist() == [[4, 7, 11, 14, 17], [-1] * 5, [0, 2, 3, -1, -1]] and found[
        "last"
    ].tolist()[0] == [5, 7, 11, 14, 18]
    columns, table = (
        {"audio": "sound", "start": "from"},
        pa.table({"sound": ["x"] * 3, "from": [0.0, 5.0, 100.25]}),
    )
    # type: ignore[arg-type]
    out = task.objective.output_columns(found, RawRows(table, columns, None))
    assert out["text"].tolist() == ["AB CC", "", "BB"]
    edge = [float(one) for one in conv_arithmetic.seconds(np.arange(30), MEL, 16000)]
    # A frame sees 400 samples, and stands for the 160 in their middle
    assert edge[4] == pytest.approx(4 * 0.01 + 120 / 16000)
    assert out["words"][0] == [
        {"word": "AB", "start": pytest.approx(edge[4]), "end": pytest.approx(edge[8])},
        {"word": "CC", "start": pytest.approx(edge[14]), "end": pytest.approx(edge[19])},
    ]
    assert out["words"][1] == [] and out["words"][2] == [
        {
            "word": "BB",
            "start": pytest.approx(100.25 + edge[0]),
            "end": pytest.approx(100.25 + edge[3]),
        }
    ]
    # type: ignore[arg-type]
    whole = task.objective.output_columns(
        found, RawRows(table.select(["sound"]), {"audio": "sound"}, None)
    )
    assert whole["words"][2][0]["start"] == pytest.approx(edge[0])
    held = pa.array(out["words"].tolist(), CTC.output_types["words"])
    assert (
        held.to_pylist() == out["words"].tolist()
        and pa.array([[], []], CTC.output_types["words"]).type == held.type
    )


@pytest.mark.usefixtures("beam_search")
def test_confidence_is_the_texts_own_probability_a_label():
    mels, _ = random_rows(20, seed=7)
    task = task_of(beam=50)
    found = task.objective.predict(task.backbone, batch_of(mels))
    for mel, labels, sure in zip(mels, found["prediction"], found["confidence"], strict=True):
        labels = labels[labels >= 0]
        nats = F.ctc_loss(
            mel.log_softmax(-1)[:, None],
            labels[None].long(),
            torch.tensor([len(mel)]),
            torch.tensor([len(labels)]),
            reduction="sum",
        )
        assert (
            float(sure.detach())
            == pytest.approx(math.exp(-float(nats) / max(1, len(labels))), rel=1e-4)
            and 0 < sure < 1
        )


def test_alignment_is_the_likeliest_of_all_paths():
    rng = torch.Generator().manual_seed(2)
    for _ in range(10):
        log_probs = torch.randn(1, 6, 3, generator=rng).log_softmax(-1)
        labels = torch.tensor([[1, 1, 2]], dtype=torch.int32)
        paths = [
            path
            for path in itertools.product(range(3), repeat=6)
            if tuple(k for k, _ in itertools.groupby(path) if k) == (1, 1, 2)
        ]
        best = max(
            paths,
            key=lambda path: sum(float(log_probs[0, i, label]) for i, label in enumerate(path)),
        )
        runs, place = [], 0
        for label, run in itertools.groupby(best):
            width = len(list(run))
            runs += [(place, place + width - 1)] if label else []
            place += width
        first, last = ctc.aligned(log_probs, torch.tensor([6]), labels)
        assert list(zip(first[0].tolist(), last[0].tolist(), strict=True)) == runs


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("units", ["characters", "subwords"])
def test_a_head_learns_to_read_what_it_hears(units):
    """Recordings whose frames show their labels, two frames each and a silent one behind, with
    noise: read nearly without error on new ones.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    said = [
        text for text in ("".join(rng.choice(list("AB C"), 6)) for _ in range(170)) if text.strip()
    ]
    table = pa.table({"said": said})
    state = CTC.fit(CTCOptions(units=units, vocabulary=12), table, COLUMNS)
    labels = [row.tolist() for row in CTC.encode(table, COLUMNS, state)["transcript"]]
    width = len(state["labels"])
    shown = [
        F.one_hot(F.pad(torch.tensor(row)[:, None].expand(-1, 2), (0, 1)).flatten(), width)
        + 0.1 * torch.randn(3 * len(row), width)
        for row in labels
    ]
    task = task_of(state, width=width, convolutions=1)
    optimizer = torch.optim.Adam(task.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        total, count, _ = task(batch_of(shown[:120], labels[:120]))
        (total / count).backward()
        optimizer.step()
    with torch.no_grad():
        found = task.objective.predict(task.backbone, batch_of(shown[120:], labels[120:]))
    whole = task.objective.postprocess(
        {n: t.numpy() for n, t in found.items()}, RawRows(table.slice(120), COLUMNS, None)
    )  # type: ignore[arg-type]
    assert metric("cer").value(whole) < 0.02 and len(whole["chars"]) > 30
