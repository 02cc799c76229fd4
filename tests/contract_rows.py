"""Eight rows for every modality, backbone library and objective, as they stand in a Parquet file:
what the contract suite runs on.

A new component needs an entry in one of the tables at the end; without one `test_contracts.py` fails
and names it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import soundfile
import torch
from toys import (
    EVENT_COLUMNS,
    SMALL,
    TRAJECTORY_COLUMNS,
    episodes,
    image_file,
    images,
    label_state,
    rows_of,
    sentences,
    stays,
    task_of,
)

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Modality, Task
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data.stream import Decoder, Rows
from pipeline.media import instance_masks
from pipeline.train.source import bind_state

N = 8


@dataclass(frozen=True)
class Sample:
    """Rows of one kind: a table, the column of each role, and the modality that reads it."""

    table: pa.Table
    columns: dict[str, str]
    modality: str
    options: dict[str, Any] = field(default_factory=dict)

    def fitted(self, backbone: str) -> Modality:
        kind = registry.get("modality", self.modality)
        options = kind.options_class(**self.options)
        state = kind.fit(options, self.table, self.columns, backbone)
        return bundle.build_modality(ModalitySpec(self.modality, options.model_dump(), state))

    def packed(self, modality: Modality) -> Sample:
        """The same documents as rows of full length."""
        table, _ = modality.pack(self.table, self.columns)
        return Sample(
            table, {name: name for name in table.column_names}, self.modality, self.options
        )


@dataclass(frozen=True)
class Case:
    """An objective's rows, the smallest backbone that it takes, and its options."""

    sample: Callable[[], Sample]
    backbone: str
    backbone_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    """Parts of the backbone that the objective does not train."""

    def build(self, objective: str) -> Built:
        """The objective on the backbone with random weights, and its rows in memory."""
        sample, kind = self.sample(), registry.get("objective", objective)
        modality = sample.fitted(self.backbone)
        if kind.packed:
            sample = sample.packed(modality)
        options = kind.options_class(**self.options)
        arch = Architecture(self.backbone, self.backbone_options, modality.inputs())
        state = bind_state(kind, kind.fit(options, sample.table, sample.columns), arch)
        backbone = bundle.build_backbone(arch, seed=1)
        wake(backbone)
        task = Task(backbone, kind(backbone, options, state))
        arrays, bad = Decoder(modality, objective, state, sample.columns)(sample.table)
        assert not any(bad), bad
        return Built(task, rows_of(modality, arrays, objective, state), sample, self.unused)


class Built(NamedTuple):
    task: Task
    rows: Rows
    sample: Sample
    unused: tuple[str, ...]


def wake(module: torch.nn.Module) -> None:
    """Shake vectors and what starts as zeros: a scale of zero would hide the gradient behind it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() < 2 or not p.any():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


# ---------------------------------------------------------------- images


def disc(size: int, middle: float, radius: float) -> dict[str, Any]:
    """Run lengths of a disc on the diagonal, in shares of the image."""
    grid = (np.arange(size) + 0.5) / size - middle
    return instance_masks.packed(grid**2 + grid[:, None] ** 2 <= radius**2)


def pictures(size: int = 32, **options: Any) -> Sample:
    pixels, labels = images(N, size, 3)
    masks = np.random.default_rng(1).integers(0, 3, (N, size, size), dtype=np.uint8)
    table = pa.table(
        {
            "image": [image_file(np.moveaxis(one, 0, -1)) for one in pixels],
            "label": labels,
            "caption": [
                f"a {('dark', 'pale', 'striped')[i]} thing, number {n}"
                for n, i in enumerate(labels)
            ],
            "photo": [n % 6 for n in range(N)],  # two of them have two captions
            "labels": [["a"], ["a", "b"], ["b"], [], ["c"], ["a", "c"], ["b", "c"], ["c"]],
            "boxes": [[[0.0, 0.0, 1.0, 1.0], [0.15, 0.15, 0.65, 0.65], [0.7, 0.7, 0.9, 0.9]]] * N,
            "classes": [["cat", "dog", "dog"]] * N,
            "masks": [[disc(size, 0.5, 0.5), disc(size, 0.4, 0.25), disc(size, 0.8, 0.1)]] * N,
            "mask": [image_file(mask) for mask in masks],
        }
    )
    return Sample(table, {"image": "image"}, "image", {"size": size, "channels": 3, **options})


def with_roles(sample: Callable[..., Sample], **columns: str) -> Callable[[], Sample]:
    def made() -> Sample:
        plain = sample()
        return Sample(plain.table, {**plain.columns, **columns}, plain.modality, plain.options)

    return made


# ---------------------------------------------------------------- texts


def texts() -> Sample:
    lines, labels = sentences(N)
    words = [["Ada", "went", "to", "old", "Rome", "."]] * N
    tags = [["B-person", "O", "O", "B-place", "I-place", "O"]] * N
    contexts = [f"{line} In the end Ada went to Rome." for line in lines]
    table = pa.table(
        {
            "text": lines,
            "label": labels,
            "words": words,
            "tags": tags,
            "question": ["Where did Ada go?"] * N,
            "context": contexts,
            "answers": [["Rome"]] * N,
            "starts": [[context.rindex("Rome")] for context in contexts],
        }
    )
    return Sample(table, {"text": "text"}, "text", {"length": 32, "vocabulary": 400})


def questions() -> Sample:
    plain = texts()
    columns = {
        "text": "question",
        "text_pair": "context",
        "answers": "answers",
        "answer_start": "starts",
    }
    return Sample(
        plain.table, columns, "text", {"length": 48, "windows": 12, "stride": 8, "vocabulary": 400}
    )


# ---------------------------------------------------------------- recordings


def recording(i: int, rate: int = 16000) -> bytes:
    rng, t = np.random.default_rng(i), np.arange(int(rate * (0.5 + 0.05 * i))) / rate
    sink = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * (i % 4)) * t) + 0.01 * rng.standard_normal(len(t))
    soundfile.write(sink, tone.astype(np.float32), rate, format="FLAC")
    return sink.getvalue()


def recordings(**options: Any) -> Callable[[], Sample]:
    def made() -> Sample:
        table = pa.table(
            {
                "audio": [recording(i) for i in range(N)],
                "label": [i % 3 for i in range(N)],
                "transcript": [("one two", "two", "three", "one three")[i % 4] for i in range(N)],
            }
        )
        return Sample(table, {"audio": "audio"}, "audio", options)

    return made


# ---------------------------------------------------------------- records, tables, episodes


def records() -> Sample:
    table = stays(N)
    hours = [[float(hour) for hour in range(4, 20)]] * N
    table = table.append_column("label_times", pa.array(hours, pa.list_(pa.float32())))
    values = [[float((hour + i) % 3 == 0) for hour in range(16)] for i in range(N)]
    table = table.append_column("label_values", pa.array(values, pa.list_(pa.float32())))
    return Sample(table, dict(EVENT_COLUMNS), "events", {"hours": 24, "min_rows": 1})


def features() -> Sample:
    return Sample(stays(N), {"features": "static"}, "table", {"min_rows": 1})


def demonstrations() -> Sample:
    return Sample(episodes(N), dict(TRAJECTORY_COLUMNS), "trajectory")


def windows() -> Sample:
    """Sensors of rows of several lengths, with missing numbers and a channel that is null."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N):
        steps = 28 + i
        wave = np.sin(np.arange(steps) * (1 + i % 3) / 3) + 0.1 * rng.standard_normal(steps)
        gaps = np.where(rng.random(steps) < 0.1, np.nan, 5 + 2 * wave)
        slope = None if i == 4 else np.arange(steps) / 10
        rows.append({"heart": wave, "pressure": gaps, "slope": slope})
    table = pa.table({"signal": rows, "label": [i % 3 for i in range(N)]})
    return Sample(table, {"series": "signal"}, "series", {"length": 32})


# ---------------------------------------------------------------- the tables

WAV2VEC2 = {"layers": 1, "hidden": 16, "heads": 2, "conv_channels": 8, "dropout": 0.0}
DEEPSPEECH2 = {"layers": 1, "hidden": 16, "channels": 16, "kernels": [5, 5], "dropout": 0.0}
CONFORMER = {
    "layers": 1,
    "hidden": 16,
    "channels": 4,
    "heads": 2,
    "intermediate": 24,
    "kernel": 7,
    "dropout": 0.0,
}
WAVENET = {
    "layers": 3,
    "stacks": 2,
    "residual": 6,
    "skip": 5,
    "pool": 160,
    "frame_layers": 2,
    "frame_kernel": 3,
}
HF_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "embedding_size": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HF_IMAGE = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
HF_SERIES = {
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
}
HF_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
BERT, GPT2, VIT = ("transformers/bert", SMALL), ("transformers/gpt2", SMALL), ("timm/test_vit", {})
MELS, SAMPLES = recordings(mels=20), recordings()

MODALITIES: dict[str, tuple[Callable[[], Sample], str]] = {
    "audio": (MELS, "torchaudio/deepspeech2"),
    "events": (records, "events/gru"),
    "image": (pictures, "timm/test_vit"),
    "series": (windows, "hf/patchtst"),
    "table": (features, "table/ft_transformer"),
    "text": (texts, "transformers/bert"),
    "trajectory": (demonstrations, "policy/mlp"),
}
"""Modality to rows and the backbone that it is fitted for."""

BACKBONES: dict[str, tuple[Callable[[], Sample], dict[str, Any]]] = {
    "events/gru": (records, {}),
    "events/strats": (records, {}),
    "hf/convnext": (pictures, {"config": HF_IMAGE}),
    "hf/electra": (texts, {"config": HF_TEXT}),
    "hf/hubert": (SAMPLES, {"config": HF_AUDIO}),
    "hf/patchtst": (windows, {"config": HF_SERIES}),
    "policy/mlp": (demonstrations, {}),
    "policy/transformer": (demonstrations, {}),
    "table/ft_transformer": (features, {}),
    "timm/convnext_atto": (pictures, {}),
    "timm/resnet10t": (pictures, {}),
    "timm/vgg11": (pictures, {}),
    "timm/vit_tiny_patch16_224": (pictures, {}),
    "torchaudio/conformer": (MELS, CONFORMER),
    "torchaudio/deepspeech": (MELS, {"hidden": 16, "context": 2, "dropout": 0.0}),
    "torchaudio/deepspeech2": (MELS, DEEPSPEECH2),
    "transformers/bert": (texts, SMALL),
    "transformers/distilbert": (texts, SMALL),
    "transformers/gpt2": (texts, SMALL),
    "transformers/roberta": (texts, SMALL),
    "transformers/wav2vec2": (SAMPLES, WAV2VEC2),
    "wavenet/wavenet": (SAMPLES, WAVENET),
}
"""Backbone to rows and options: every architecture of a library that lists them, some of one that
takes them from a package.
"""

OBJECTIVES: dict[str, Case] = {
    "behaviour_cloning": Case(demonstrations, "policy/mlp", {"width": 16}),
    "classification": Case(with_roles(pictures, label="label"), *VIT),
    "clip": Case(
        with_roles(pictures, caption="caption", image_id="photo"),
        *VIT,
        {"width": 16, "layers": 1, "heads": 2},
    ),
    "clm": Case(texts, *GPT2),
    "ctc": Case(
        with_roles(MELS, transcript="transcript"),
        "torchaudio/deepspeech2",
        DEEPSPEECH2,
        unused=("front.mask_embedding",),
    ),
    "detection": Case(
        with_roles(lambda: pictures(128, fit="pad"), boxes="boxes", labels="classes"),
        "timm/test_resnet",
        {},
        {"channels": 64, "convs": 1},
    ),
    "dino": Case(pictures, *VIT),
    "dynamics": Case(demonstrations, "policy/mlp", {"width": 16}),
    "forecast": Case(records, "events/gru"),
    "hourly": Case(
        with_roles(records, label_times="label_times", label_values="label_values"), "events/gru"
    ),
    "instance_segmentation": Case(
        with_roles(
            lambda: pictures(128, fit="pad"), boxes="boxes", labels="classes", masks="masks"
        ),
        "timm/test_resnet",
        {},
        {"channels": 64, "mask_convs": 1},
    ),
    "mae": Case(pictures, *VIT),
    "masked_columns": Case(features, "table/ft_transformer"),
    "masked_events": Case(records, "events/strats"),
    "masked_series": Case(windows, "hf/patchtst", {"config": HF_SERIES}),
    "mlm": Case(texts, *BERT),
    "multilabel": Case(with_roles(pictures, labels="labels"), *VIT),
    "next_sample": Case(SAMPLES, "wavenet/wavenet", WAVENET, unused=("norm.", "frames.")),
    "qa": Case(questions, *BERT),
    "regression": Case(with_roles(features, value="events"), "table/ft_transformer"),
    "segmentation": Case(
        with_roles(lambda: pictures(fit="pad"), mask="mask"), "timm/test_resnet", {}, {"classes": 3}
    ),
    "simclr": Case(pictures, *VIT),
    "tagging": Case(with_roles(texts, text="words", tags="tags"), *BERT),
    "verification": Case(
        with_roles(MELS, identity="label"),
        "torchaudio/deepspeech2",
        DEEPSPEECH2,
        {"width": 8},
        unused=("front.mask_embedding",),
    ),
    "wav2vec2": Case(
        SAMPLES,
        "transformers/wav2vec2",
        WAV2VEC2,
        {"entries": 8, "code_width": 8, "width": 8, "negatives": 5, "mask_length": 4},
    ),
}
"""Objective to the rows, the smallest backbone and the options that it is tried with."""


def classified(name: str, seed: int = 1) -> tuple[Task, Rows]:
    """A backbone with a head for three classes, and its rows in memory.

    The backbone is one of `BACKBONES` or of `MODALITIES`.
    """
    make_sample, options = BACKBONES.get(name) or next(
        (make_sample, {}) for make_sample, backbone in MODALITIES.values() if backbone == name
    )
    sample = make_sample()
    modality = sample.fitted(name)
    arrays, bad = modality.decode(sample.table, sample.columns)
    assert not any(bad), bad
    state = label_state()
    rows = rows_of(modality, {**arrays, "label": np.arange(N) % 3}, "classification", state)
    task = task_of(name, modality.inputs(), "classification", state, seed=seed, **options)
    wake(task)
    return task, rows
