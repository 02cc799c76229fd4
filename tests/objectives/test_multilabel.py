"""Label sets in whatever form a column holds them; the loss is the binary cross-entropy; a trained
head finds its labels.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F
from toys import Net, image_rows, images

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch, Task
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.objectives.multilabel import Multilabel, MultilabelOptions

COLUMNS = {"labels": "findings"}
OPTIONS = MultilabelOptions()
ROWS = [["Mass", "Effusion"], [], None, ["Effusion"], ["Edema", "Edema"]]
KNOWN = ["Edema", "Effusion", "Mass"]
WANT = [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]


def column(kind: str) -> pa.ChunkedArray:
    """The same label sets in each form that a column may have, in two chunks of which the second
    does not begin at its buffer's start.
    """
    joined = [None if r is None else "|".join(r) for r in ROWS]
    forms = {
        "lists": pa.array(ROWS),
        "large lists": pa.array(ROWS, pa.large_list(pa.large_string())),
        "texts": pa.array(joined),
        "spaced texts": pa.array(
            [None if t is None else t.replace("|", " | ") for t in joined], pa.large_string()
        ),
        "dictionary": pa.array(joined).dictionary_encode(),
        "lists of a dictionary": pa.ListArray.from_arrays(
            pa.array([0, 2, None, 2, 3, 5], pa.int32()),
            pa.array(["Mass", "Effusion", "Effusion", "Edema", "Edema"]).dictionary_encode(),
        ),
    }
    whole = forms[kind]
    return pa.chunked_array([whole.slice(0, 2), whole.slice(2)])


@pytest.mark.parametrize(
    "kind", ["lists", "large lists", "texts", "spaced texts", "dictionary", "lists of a dictionary"]
)
def test_every_form_of_a_column_gives_the_same_labels(kind):
    table = pa.table({"findings": column(kind)})
    state = Multilabel.fit(OPTIONS, table, COLUMNS)
    assert state == {"labels": KNOWN, "separator": "|", "positives": [1, 2, 1], "rows": 5}
    found = Multilabel.encode(table, COLUMNS, state)["labels"]
    assert found.dtype == np.uint8 and found.tolist() == WANT
    assert Multilabel.encode(table.slice(3), COLUMNS, state)["labels"].tolist() == WANT[3:]


def test_integers_other_separators_and_given_labels():
    numbers = pa.table({"findings": pa.array([[3, 10], [], [3]])})
    state = Multilabel.fit(OPTIONS, numbers, COLUMNS)
    assert state["labels"] == ["10", "3"] and Multilabel.encode(numbers, COLUMNS, state)[
        "labels"
    ].tolist() == [[1, 1], [0, 0], [0, 1]]
    texts = pa.table({"findings": ["b;a", "", "a"]})
    given = Multilabel.fit(MultilabelOptions(separator=";", labels=["b", "c", "a"]), texts, COLUMNS)
    assert given["positives"] == [1, 0, 2] and Multilabel.encode(texts, COLUMNS, given)[
        "labels"
    ].tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_rows_without_any_label_in_a_batch_and_rows_without_the_column():
    state = {"labels": KNOWN, "separator": "|"}
    for empty in (
        pa.nulls(3),
        pa.array([None, [], []], pa.list_(pa.string())),
        pa.array([[], [], []]),
    ):
        assert (
            Multilabel.encode(pa.table({"findings": empty}), COLUMNS, state)["labels"].tolist()
            == [[0, 0, 0]] * 3
        )
    assert Multilabel.encode(
        pa.table({"findings": pa.array([], pa.list_(pa.string()))}), COLUMNS, state
    )["labels"].shape == (0, 3)
    assert Multilabel.encode(pa.table({"image": [b""]}), COLUMNS, state) == {}


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, [[], None], "column findings: none of 2 training rows has a label"),
        ({"labels": ["a", "a"]}, [["a"]], r"option labels of multilabel: \['a'\] occur twice"),
        (
            {"labels": ["Mass", "Edema"]},
            [["Mass"], ["Edma"]],
            "column findings: label 'Edma' is not one of the 2 known ones .* did you mean Edema",
        ),
        ({}, [["a", None]], "column findings: 1 labels inside its lists are null"),
        ({}, [[0.5]], "column findings holds lists of double: labels are texts or integers"),
        (
            {},
            [3, 4],
            r"column findings holds int64: labels are lists of texts or integers, or texts "
            r"such as 'A\|B'",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_reported(options, rows, message):
    with pytest.raises(ValueError, match=message):
        Multilabel.fit(
            MultilabelOptions(**options), pa.table({"findings": pa.array(rows)}), COLUMNS
        )


def test_an_unknown_label_names_its_neighbour():
    state = Multilabel.fit(OPTIONS, pa.table({"findings": pa.array(ROWS)}), COLUMNS)
    with pytest.raises(
        ValueError,
        match=r"column findings: label 'Efusion' is not one of the 3 known ones .* did you mean "
        r"Effusion\?",
    ):
        Multilabel.encode(pa.table({"findings": ["Mass|Efusion"]}), COLUMNS, state)


# ---------------------------------------------------------------- loss and predictions


def built(seed: int = 0, **options) -> Task:
    torch.manual_seed(seed)
    net = Net()
    return Task(
        net,
        Multilabel(
            net,
            MultilabelOptions(**options),
            {"labels": KNOWN, "separator": "|", "positives": [5, 0, 20], "rows": 40},
        ),
    )


def batch(n: int = 24, seed: int = 0) -> Batch:
    """Rows that have the second label by their pattern, the first by their brightness, the third at
    random.
    """
    pixels, pattern = images(n, seed=seed)
    bright = pixels.mean((1, 2, 3))
    labels = np.stack(
        [bright > np.median(bright), pattern == 1, np.random.default_rng(seed).random(n) < 0.5],
        axis=1,
    )
    return Batch(
        np.arange(n),
        torch.zeros(n, dtype=torch.int64),
        {
            "image": torch.from_numpy(pixels).float() / 64 - 2,
            "labels": torch.from_numpy(labels.astype(np.uint8)),
        },
    )


@pytest.mark.parametrize(("pos_weight", "weights"), [("none", [1, 1, 1]), ("balanced", [7, 40, 1])])
def test_the_loss_is_the_binary_cross_entropy(pos_weight, weights):
    """A sum over rows of means over labels, so that micro-batches add up; balanced: positives weigh
    negatives / positives.
    """
    task, rows = built(pos_weight=pos_weight), batch()
    total, count, _ = task(rows)
    chance = task.objective.scores(task.backbone(rows).pooled).sigmoid().double()
    y = rows["labels"].double()
    want = -(torch.tensor(weights) * y * chance.log() + (1 - y) * (1 - chance).log())
    assert total.item() == pytest.approx(want.mean(1).sum().item(), rel=1e-5) and count.item() == 24
    parts = [task(part) for part in rows.split(7)]
    assert sum(p[0].item() for p in parts) == pytest.approx(total.item(), rel=1e-6)
    found = task.eval().objective.predict(task.backbone, rows)
    plain = F.binary_cross_entropy(chance, y, reduction="none").mean(1)
    # Never weighted
    assert found["loss"].double().detach().numpy() == pytest.approx(
        plain.detach().numpy(), rel=1e-5
    )
    assert (
        torch.equal(found["labels"], rows["labels"]) and found["min_positives"].tolist() == [1] * 24
    )


def test_training_finds_the_labels_and_written_names_them():
    task, rows = built(), batch(60)
    optimiser = torch.optim.AdamW(task.parameters(), 0.02)
    for _ in range(80):
        total, count, _ = task(rows)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    with torch.no_grad():
        found = {
            name: tensor.numpy()
            for name, tensor in task.eval().objective.predict(task.backbone, rows).items()
        }
    out = task.objective.output_columns(found, None)
    assert set(out) == {"prediction", "probability", "probabilities"} and out[
        "probabilities"
    ] == pytest.approx(1 / (1 + np.exp(-found["scores"])), rel=1e-5)
    for names, values, of_labels in zip(
        out["prediction"], out["probability"], out["probabilities"], strict=True
    ):
        assert values == [of_labels[KNOWN.index(name)] for name in names]
    named = [[KNOWN[k] for k in np.flatnonzero(row)] for row in rows["labels"].numpy()]
    assert (
        out["prediction"].dtype == object
        and sum(a == b for a, b in zip(out["prediction"], named, strict=True)) >= 54
    )
    assert [
        type(p)
        for p in task.objective.output_columns({"scores": found["scores"][:1]}, None)["prediction"]
    ] == [list]


def test_a_head_is_carried_over_by_the_names_of_its_labels(tmp_path):
    modality = image_rows(4).modality
    arch = Architecture("timm/test_vit", {}, {"channels": 1, "size": 32})
    head = ObjectiveSpec(
        "multilabel", {}, {"labels": KNOWN, "separator": "|", "positives": [1, 1, 1], "rows": 3}
    )
    task = bundle.build_task(arch, head, seed=1)
    bundle.save(
        str(tmp_path / "b"),
        task,
        ModalitySpec("image", modality.options.model_dump(), modality.state),
    )
    saved = bundle.load(str(tmp_path / "b"))
    again = bundle.build_task(
        arch, replace(head, state={**head.state, "labels": KNOWN[::-1]}), seed=2
    )
    assert bundle.carry_head(again, saved) == "head kept: the same labels, put into their new order"
    assert torch.equal(again.objective.head.weight, task.objective.head.weight.flip(0))
    other = bundle.build_task(
        arch, replace(head, state={**head.state, "labels": ["Edema", "Mass", "Nodule"]}), seed=2
    )
    assert "new head: its labels differ" in bundle.carry_head(other, saved)


def test_the_focal_loss_is_that_of_each_label():
    """Lin et al. 2017, with the weights of positives; only in training."""
    task, plain, rows = (
        built(pos_weight="balanced", focal=1.5),
        built(pos_weight="balanced"),
        batch(),
    )
    chance = task.objective.scores(task.backbone(rows).pooled).sigmoid().double()
    y, weights = rows["labels"].double(), torch.tensor([7, 40, 1])
    want = -(
        weights * y * (1 - chance) ** 1.5 * chance.log()
        + (1 - y) * chance**1.5 * (1 - chance).log()
    )
    assert task.train()(rows)[0].item() == pytest.approx(want.mean(1).sum().item(), rel=1e-4)
    assert task.eval()(rows)[0].item() == pytest.approx(plain.eval()(rows)[0].item(), rel=1e-6)


@torch.no_grad()
def test_one_temperature_is_fitted_for_all_labels():
    task, rows = built(calibrate="temperature").eval(), batch(60)
    rows = rows.replace(
        labels=torch.bernoulli(task.objective.predict(task.backbone, rows)["scores"].sigmoid()).to(
            torch.uint8
        )
    )
    for tensor in task.objective.head.parameters():
        tensor.mul_(6)
    state = task.objective.state
    before = {
        name: tensor.numpy() for name, tensor in task.objective.predict(task.backbone, rows).items()
    }
    task.objective.calibrate(before)
    after = {
        name: tensor.numpy() for name, tensor in task.objective.predict(task.backbone, rows).items()
    }
    hot = task.objective.state["temperature"]
    assert (
        "temperature" not in state
        and 2 < hot < 19
        and task.objective.needs_calibration
        and not built().objective.needs_calibration
    )
    assert after["scores"] == pytest.approx(before["scores"] / hot, rel=1e-5)
    assert after["loss"].mean() < before["loss"].mean()
    for other in (0.9 * hot, 1.1 * hot):
        scores, labels = (
            torch.from_numpy(before["scores"] / other),
            torch.from_numpy(before["labels"]).float(),
        )
        assert F.binary_cross_entropy_with_logits(scores, labels) > after["loss"].mean()
