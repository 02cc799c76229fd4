"""Labels of classification, in whatever type a column holds them; mixup and CutMix as their papers
have them.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from toys import Net, images, label_state, text_rows

from pipeline.config.schema import Train
from pipeline.core.contracts import Batch, Task
from pipeline.core.rng import row_keys
from pipeline.data.plan import Plan
from pipeline.objectives import classification
from pipeline.objectives.classification import Classification, ClassificationOptions
from pipeline.train import streams

COLUMNS = {"label": "kind"}
OPTIONS = ClassificationOptions()


def dictionary(*chunks: list) -> pa.ChunkedArray:
    """A pandas categorical as it comes out of Parquet: every chunk has its own dictionary."""
    return pa.chunked_array([pa.array(chunk).dictionary_encode() for chunk in chunks])


@pytest.mark.parametrize(
    ("first", "second", "known"),
    [(["dog", "cat", "dog"], ["bee", "dog"], ["bee", "cat", "dog"]), ([7, 5], [5, 6], [5, 6, 7])],
)
def test_labels_stored_as_a_dictionary_are_those_of_their_values(first, second, known):
    plain, coded = (
        pa.table({"kind": [*first, *second]}),
        pa.table({"kind": dictionary(first, second)}),
    )
    state = Classification.fit(OPTIONS, coded, COLUMNS)
    assert (
        state
        == Classification.fit(OPTIONS, plain, COLUMNS)
        == {"values": known, "labels": [str(v) for v in known]}
    )
    found = Classification.encode(coded, COLUMNS, state)["label"]
    assert (
        found.tolist()
        == [known.index(v) for v in (*first, *second)]
        == Classification.encode(plain, COLUMNS, state)["label"].tolist()
    )


def test_names_stored_as_a_dictionary_of_which_one_is_null():
    table = pa.table({"kind": dictionary([1, 0, 1]), "name": dictionary(["dog", "cat", None])})
    assert Classification.fit(OPTIONS, table, {"label": "kind", "label_name": "name"}) == {
        "values": [0, 1],
        "labels": ["cat", "dog"],
    }


def plain(*chunks: list) -> pa.ChunkedArray:
    return pa.chunked_array(chunks)


@pytest.mark.parametrize("column", [plain, dictionary])
def test_unknown_and_missing_labels_are_reported(column):
    state = Classification.fit(OPTIONS, pa.table({"kind": column(["cat", "dog"])}), COLUMNS)
    with pytest.raises(
        ValueError,
        match=r"column kind: label 'dgo' is in no training row \(2 labels known\); did you mean dog",
    ):
        Classification.encode(pa.table({"kind": column(["cat"], ["dgo"])}), COLUMNS, state)
    missing = (
        r"column kind: 1 of 3 rows have no label \(null\); write their labels, or leave these "
        r"rows out: data\.where: \{kind: \[cat, dog\]\} "
        "keeps the rows that have one"
    )
    for read in (
        lambda table: Classification.fit(OPTIONS, table, COLUMNS),
        lambda table: Classification.encode(table, COLUMNS, state),
    ):
        with pytest.raises(ValueError, match=missing):
            read(pa.table({"kind": column(["cat", None], ["dog"])}))


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([1, 2]).dictionary_encode()])
def test_labels_of_another_type_than_in_training_are_reported(column):
    state = Classification.fit(OPTIONS, pa.table({"kind": ["cat", "dog"]}), COLUMNS)
    with pytest.raises(
        ValueError,
        match=r"column kind: it holds int64 values, but the labels of the training rows are like "
        r"'cat'",
    ):
        Classification.encode(pa.table({"kind": column}), COLUMNS, state)


# ---------------------------------------------------------------- mixup and CutMix


def keys(n: int, seed: int = 0) -> torch.Tensor:
    rows = np.arange(n)
    return torch.from_numpy(row_keys(seed, np.zeros_like(rows), rows))


def batch(n: int = 16, shards: int = 4) -> Batch:
    pixels, label = images(n)
    return Batch(
        np.arange(n),
        keys(n),
        {"image": torch.from_numpy(pixels).float() / 64 - 2, "label": torch.from_numpy(label)},
        np.arange(n) % shards,
    )


def task_with(seed: int = 0, **options) -> Task:
    torch.manual_seed(seed)
    net = Net()
    return Task(net, Classification(net, ClassificationOptions(**options), label_state()))


def ring(n: int = 16, shards: int = 4) -> torch.Tensor:
    """Row i is in shard i modulo ``shards``, and its partner the next one there."""
    return torch.tensor([i + shards if i + shards < n else i % shards for i in range(n)])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.7, 1.0])
def test_shares_have_the_beta_distribution(alpha):
    found = classification.beta(keys(20_000), alpha).double().numpy()
    assert found.min() >= 0 and found.max() <= 1
    # float32 rounds the ends, where a small alpha has much of its mass
    inner = found[(found > 1e-6) & (found < 1 - 1e-6)]
    low, high = stats.beta.cdf((1e-6, 1 - 1e-6), alpha, alpha)
    assert len(inner) / len(found) == pytest.approx(high - low, abs=0.015)
    assert (
        stats.kstest(inner, lambda x: (stats.beta.cdf(x, alpha, alpha) - low) / (high - low)).pvalue
        > 0.01
    )


def test_mixup_is_the_formula_of_the_paper(monkeypatch):
    """Zhang et al. 2018: x = l x_i + (1 - l) x_j, y = l y_i + (1 - l) y_j, and the cross-entropy
    with that y.
    """
    rows, other = batch(), ring()
    share = torch.linspace(0, 1, 16)
    monkeypatch.setattr(classification, "beta", lambda keys, alpha: share)
    task = task_with(mixup=0.4, label_smoothing=0.1)
    total, count, logs = task(rows)
    x = (
        share[:, None, None, None] * rows["image"]
        + (1 - share)[:, None, None, None] * rows["image"][other]
    )
    y = F.one_hot(rows["label"], 3).float()
    y = share[:, None] * y + (1 - share)[:, None] * y[other]
    scores = task.objective.scores(task.backbone(rows.replace(image=x)).pooled)
    assert (
        total.item()
        == pytest.approx(
            F.cross_entropy(scores, y, reduction="sum", label_smoothing=0.1).item(), rel=1e-5
        )
        and count.item() == 16
    )
    assert logs["accuracy"].item() == pytest.approx(
        y[torch.arange(16), scores.argmax(1)].sum().item(), rel=1e-5
    )


def rand_bbox(width: int, height: int, lam: float, cx: int, cy: int) -> tuple[int, int, int, int]:
    """Of the authors' CutMix code (clovaai/CutMix-PyTorch), with the centre given."""
    cut_rat = np.sqrt(1.0 - lam)
    cut_w, cut_h = int(width * cut_rat), int(height * cut_rat)
    return (
        int(np.clip(cx - cut_w // 2, 0, width)),
        int(np.clip(cy - cut_h // 2, 0, height)),
        int(np.clip(cx + cut_w // 2, 0, width)),
        int(np.clip(cy + cut_h // 2, 0, height)),
    )


def test_cutmix_is_the_code_of_the_authors(monkeypatch):
    """A patch of the partner at the same place; labels are mixed by the pixels that it has after it
    was cut off at the border.
    """
    rows = batch(64)
    rows = rows.replace(
        image=torch.randn(64, 2, 12, 10, generator=torch.Generator().manual_seed(0))
    )
    lam = torch.linspace(0, 1, 64)
    monkeypatch.setattr(classification, "beta", lambda keys, alpha: lam)
    other, share, found = classification.mixed(rows, 0.0, 1.0)
    assert torch.equal(other, ring(64))
    place = classification.uniform(rows.keys, 3, classification.CUT)
    for i in range(64):
        x0, y0, x1, y1 = rand_bbox(
            10, 12, lam[i].item(), int(place[i, 2] * 10), int(place[i, 1] * 12)
        )
        want = rows["image"][i].clone()
        want[:, y0:y1, x0:x1] = rows["image"][other[i], :, y0:y1, x0:x1]
        assert torch.equal(found[i], want)
        assert share[i].item() == pytest.approx(1 - (x1 - x0) * (y1 - y0) / 120)
    assert len(share.unique()) > 15


def test_with_both_each_row_takes_one():
    rows = batch(4000)
    x, other = rows["image"], ring(4000)
    _, share, found = classification.mixed(rows, 0.5, 0.5)
    # Every pixel is one row's or the other's
    cut = ((found == x) | (found == x[other])).flatten(1).all(1)
    assert 0.45 < cut.float().mean() < 0.56
    assert not torch.equal(share[:2000], share[2000:])


@pytest.mark.parametrize(
    "options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5}], ids=str
)
def test_mixing_is_the_same_at_any_number_of_ranks(options):
    """Loss and gradients of 2 and 4 ranks add up to those of one; ranks hold whole shards."""
    rows = batch(48, 4)
    alone = task_with(**options)
    total, _, logs = alone(rows)
    total.backward()
    for ranks in (2, 4):
        split = task_with(**options)
        sums, hits = 0.0, 0.0
        for rank in range(ranks):
            mine = np.flatnonzero(rows.shards % ranks == rank)
            part = Batch(
                rows.rows[mine],
                rows.keys[mine],
                {name: tensor[mine] for name, tensor in rows.data.items()},
                rows.shards[mine],
            )
            loss, _, more = split(part)
            loss.backward()
            sums, hits = sums + loss.item(), hits + more["accuracy"].item()
        assert (sums, hits) == pytest.approx((total.item(), logs["accuracy"].item()), rel=1e-5)
        for p, q in zip(alone.parameters(), split.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    plain, _, _ = task_with()(rows)
    assert abs(plain.item() - total.item()) > 1e-3


def test_nothing_is_mixed_in_evaluation():
    rows, mixing, plain = batch(), task_with(mixup=0.4, cutmix=1.0).eval(), task_with().eval()
    assert torch.equal(mixing(rows)[0], plain(rows)[0])
    found, want = (task.objective.predict(task.backbone, rows) for task in (mixing, plain))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_what_cannot_be_mixed_is_reported():
    task = task_with(mixup=0.4)
    with pytest.raises(ValueError, match="cannot train a head on cached features"):
        task.objective.head_loss(torch.zeros(4, 16), batch(4))
    message = r"these 4 rows lie in as many shards: leave train\.canonical_shards out"
    with pytest.raises(ValueError, match=message):
        task(batch(4, 4))
    task(batch(15, 8))  # a batch of 16 rows, one of which could not be decoded
    tokens = text_rows(4).arrays
    with pytest.raises(ValueError, match=r"mix images, and these rows hold label, tokens"):
        classification.mixed(
            Batch(
                np.arange(4),
                keys(4),
                {"label": torch.zeros(4), "tokens": torch.from_numpy(tokens["tokens"])},
            ),
            0.4,
            0.0,
        )


@pytest.mark.parametrize("micro_batch", [None, 4, 7])
def test_each_shard_has_two_rows_of_a_pass_where_inputs_are_mixed(micro_batch):
    mixup = ClassificationOptions(mixup=0.2)
    for rows in (2, 3, 8, 10, 15, 16, 40):
        train = Train(steps=1, global_batch=rows, micro_batch=micro_batch)
        shards = streams.canonical_shards(train, 1, mixup)
        plan = Plan(4 * rows, 0, rows, shards=shards)
        for step in range(4):
            numbers, _ = plan.positions(step, 0, 1)
            whole = Batch(np.arange(rows), torch.arange(rows), {}, numbers)
            for part in whole.split(micro_batch):
                assert (part.partners() != torch.arange(len(part))).all()
    assert streams.canonical_shards(Train(steps=1, global_batch=8), 1, ClassificationOptions()) == 8
    assert streams.canonical_shards(Train(steps=1, canonical_shards=3), 12, mixup) == 3
    assert streams.canonical_shards(Train(steps=1, global_batch=8), 12, mixup) == 12


# ----------------------------------------------------------- two classes, rare classes, calibration


@pytest.mark.parametrize(
    ("positive", "values"),
    [(None, ["alive", "dead"]), ("alive", ["dead", "alive"]), ("dead", ["alive", "dead"])],
)
def test_the_positive_class_stands_second(positive, values):
    table = pa.table({"kind": ["dead", "alive", "alive"], "name": ["died", "lived", "lived"]})
    state = Classification.fit(ClassificationOptions(positive=positive), table, COLUMNS)
    assert state == {"values": values, "labels": values}
    assert Classification.encode(table, COLUMNS, state)["label"].tolist() == [
        values.index(v) for v in ("dead", "alive", "alive")
    ]


@pytest.mark.parametrize(
    ("column", "positive"),
    [
        ([0, 1, 1], 0),
        ([0, 1, 1], "0 by name"),
        ([False, True, True], False),
        ([1.5, 2.0, 2.0], 1.5),
    ],
)
def test_a_positive_class_of_any_type_is_found_by_value_or_name(column, positive):
    table = pa.table({"kind": column, "name": [f"{value} by name" for value in column]})
    state = Classification.fit(
        ClassificationOptions(positive=positive), table, {**COLUMNS, "label_name": "name"}
    )
    assert (
        state["values"][1] == column[0]
        and type(state["values"][1]) is type(column[0])
        and state["labels"][1] == f"{column[0]} by name"
    )


@pytest.mark.parametrize(
    ("options", "column", "message"),
    [
        (
            {"positive": "sick"},
            ["a", "b"],
            "option positive of classification: 'sick' is not one of the classes a, b",
        ),
        (
            {"positive": "a"},
            ["a", "b", "c"],
            "option positive of classification is for two classes, and the training rows hold 3",
        ),
        (
            {"threshold": "f1"},
            ["a", "b", "c"],
            "option threshold of classification is for two classes",
        ),
    ],
)
def test_options_of_two_classes_that_do_not_fit_are_reported(options, column, message):
    with pytest.raises(ValueError, match=message):
        Classification.fit(ClassificationOptions(**options), pa.table({"kind": column}), COLUMNS)


def test_two_classes_are_measured_by_what_clinicians_read():
    names = Classification.target_metrics(OPTIONS, label_state(2))
    assert names == (
        "accuracy",
        "macro_f1",
        "loss",
        "auroc",
        "auprc",
        "min_precision_sensitivity",
        "brier",
        "ece",
    )
    assert Classification.target_metrics(OPTIONS, label_state(3)) == Classification.metrics


def rare(**options) -> Task:
    table = pa.table({"kind": [0] * 6 + [1] * 3 + [2]})
    chosen = ClassificationOptions(**options)
    state = Classification.fit(chosen, table, COLUMNS)
    torch.manual_seed(0)
    net = Net()
    return Task(net, Classification(net, chosen, state))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_and_the_focal_loss_are_their_formulas(smoothing):
    """Weights as scikit-learn's "balanced"; only in training, and mixed rows take those of both
    classes.
    """
    from sklearn.utils.class_weight import compute_class_weight

    plain, task, rows = (
        rare(),
        rare(class_weight="balanced", focal=2.0, label_smoothing=smoothing),
        batch(18),
    )
    assert task.objective.state["counts"] == [6, 3, 1] and "counts" not in plain.objective.state
    weight = torch.from_numpy(
        compute_class_weight("balanced", classes=np.arange(3), y=np.repeat([0, 1, 2], [6, 3, 1]))
    ).float()
    scores = task.objective.scores(task.backbone(rows).pooled).double()
    label = rows["label"]
    true = scores.softmax(1)[torch.arange(18), label]
    losses = (
        F.cross_entropy(
            scores, label, weight=weight.double(), reduction="none", label_smoothing=smoothing
        )
        * (1 - true) ** 2
    )
    total, count, _ = task.train()(rows)
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-4) and count.item() == 18
    assert sum(task(part)[0].item() for part in rows.split(5)) == pytest.approx(
        total.item(), rel=1e-5
    )
    if not smoothing:
        assert losses.sum().item() == pytest.approx(
            (-weight[label] * (1 - true) ** 2 * true.log()).sum().item(), rel=1e-6
        )
    assert task.eval()(rows)[0].item() == pytest.approx(plain.eval()(rows)[0].item(), rel=1e-6)
    found = task.objective.predict(task.backbone, rows)["loss"]
    assert found.double().detach().numpy() == pytest.approx(
        F.cross_entropy(scores, label, reduction="none").detach().numpy(), rel=1e-4
    )


def test_mixed_rows_are_weighted_too(monkeypatch):
    rows, share = batch(16), torch.linspace(0, 1, 16)
    monkeypatch.setattr(classification, "beta", lambda keys, alpha: share)
    task = rare(class_weight="balanced", focal=1.0, mixup=0.4)
    x = (
        share[:, None, None, None] * rows["image"]
        + (1 - share)[:, None, None, None] * rows["image"][ring()]
    )
    scores = task.objective.scores(task.backbone(rows.replace(image=x)).pooled)
    weight, chance = torch.tensor([10 / 18, 10 / 9, 10 / 3]), scores.softmax(1)

    def of(label):
        p = chance[torch.arange(16), label]
        return -weight[label] * (1 - p) * p.log()

    want = (share * of(rows["label"]) + (1 - share) * of(rows["label"][ring()])).sum()
    assert task.train()(rows)[0].item() == pytest.approx(want.item(), rel=1e-4)


def test_a_focal_loss_of_a_certain_row_has_a_slope():
    """At p = 1 a root's slope is infinite, and the gradient would be no number."""
    task = rare(focal=0.5)
    with torch.no_grad():
        task.objective.head.weight.mul_(1e4)
    task.train()(batch(16))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


def test_temperature_and_threshold_come_from_the_rows_that_are_given():
    """The state is a new one, as trials share theirs; predict then gives calibrated scores, and
    calls by the threshold.
    """
    torch.manual_seed(0)
    net, options = Net(), ClassificationOptions(calibrate="temperature", threshold="f1")
    shared = label_state(2)
    task = Task(net, Classification(net, options, shared)).eval()
    rows = batch(64).replace(label=torch.zeros(64, dtype=torch.int64))
    with torch.no_grad():
        task.objective.head.bias[1] -= 1  # the second class is rare, and said far too surely
        rows = rows.replace(
            label=torch.distributions.Categorical(
                logits=task.objective.predict(net, rows)["scores"]
            ).sample()
        )
        for tensor in task.objective.head.parameters():
            tensor.mul_(6)
        before = {
            name: tensor.numpy() for name, tensor in task.objective.predict(net, rows).items()
        }
        assert task.objective.needs_calibration and "threshold" not in before
        task.objective.calibrate(before)
        after = {name: tensor.numpy() for name, tensor in task.objective.predict(net, rows).items()}
    state = task.objective.state
    assert (
        shared == label_state(2)
        and set(state) == {"values", "labels", "temperature", "threshold"}
        and 2 < state["temperature"] < 19
    )
    assert after["scores"] == pytest.approx(before["scores"] / state["temperature"], rel=1e-5)
    assert after["loss"].mean() < before["loss"].mean()
    assert (
        after["threshold"] == pytest.approx(np.full(64, state["threshold"]))
        and state["threshold"] < 0.5
    )
    chance = np.exp(after["scores"][:, 1]) / np.exp(after["scores"]).sum(1)
    out = task.objective.output_columns(after, None)
    assert out["prediction"].tolist() == [
        "class 1" if p >= state["threshold"] else "class 0" for p in chance
    ]
    assert out["probabilities"][:, 1] == pytest.approx(chance, abs=1e-6)
    of_predicted = np.where(out["prediction"] == "class 1", chance, 1 - chance)
    assert out["probability"] == pytest.approx(of_predicted, abs=1e-6)
    plain = task_with().objective
    assert not plain.needs_calibration


def test_a_label_that_is_nan_is_no_class():
    """Files of pandas have NaN where a label is missing."""
    rows = pa.table({"label": [0.0, 1.0, float("nan"), 1.0]})
    columns = {"label": "label"}
    with pytest.raises(ValueError, match="column label: 1 of 4 rows have no label"):
        Classification.fit(Classification.options_class(), rows, columns)
    state = Classification.fit(Classification.options_class(), rows.slice(0, 2), columns)
    with pytest.raises(ValueError, match="column label: 1 of 4 rows have no label"):
        Classification.encode(rows, columns, state)
