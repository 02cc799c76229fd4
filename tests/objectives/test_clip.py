"""CLIP: the loss is the paper's, over the rows of all ranks; texts about classes make a head."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from looks import Conv, check_ranks, check_resume, some, task
from torch.nn import functional as F

from pipeline.config import registry
from pipeline.core.contracts.objective_capabilities import CouplesRows, ReadsTexts
from pipeline.objectives.classification import Classification, ClassificationOptions
from pipeline.objectives.clip import CLIP, CLIPOptions
from pipeline.techniques.zero_shot import ZeroShot, ZeroShotOptions
from pipeline.transfer import label_sets

SMALL = {"width": 8, "layers": 1, "heads": 2}
COLUMNS = {"caption": "words"}


def captioned(words: list[str | None], **options) -> CLIP:
    """An objective fitted on captions, on a backbone with random weights."""
    torch.manual_seed(0)
    chosen = CLIPOptions(**{**SMALL, **options})
    return CLIP(Conv(), chosen, CLIP.fit(chosen, pa.table({"words": words}), COLUMNS))


def image_text_contrastive_loss(similarity: torch.Tensor) -> torch.Tensor:
    """What transformers.models.clip computes under this name, from (texts, images) logits."""
    own = similarity.diagonal()
    of_texts = (similarity.logsumexp(1) - own).mean()
    of_images = (similarity.logsumexp(0) - own).mean()
    return (of_texts + of_images) / 2


def test_loss_and_gradient_are_those_of_the_formula():
    """On what both towers return, without their means."""
    made = task("clip", temperature=0.05, **SMALL).double()
    batch, objective = some(9, ()), made.objective
    alone = torch.full((9,), -1)
    batch = batch.replace(image=batch["image"].double(), image_number=alone)
    total, count, logs = made(batch)
    total.backward()
    towers = (
        made.backbone(batch).pooled,
        objective.text(batch["caption"], batch["caption_lengths"]),
    )
    inputs = [tower.detach().requires_grad_() for tower in towers]
    centred = [one - one.mean(1, keepdim=True) for one in inputs]
    images, texts = (one / one.norm(dim=1, keepdim=True) for one in centred)
    scale = objective.log_scale.detach().clone().requires_grad_()
    assert float(scale.detach().exp()) == pytest.approx(20)
    similarity = texts @ images.T * scale.exp()
    wanted = image_text_contrastive_loss(similarity)
    (9 * wanted).backward()
    torch.testing.assert_close(total / count, wanted, rtol=1e-6, atol=0.0)
    assert int(logs["top1"]) == (similarity.argmax(0) == torch.arange(9)).sum()
    found = {name: parameter.grad for name, parameter in made.named_parameters()}
    made.zero_grad()
    torch.autograd.backward(towers, [one.grad for one in inputs])
    for name, parameter in made.named_parameters():
        want = scale.grad if name == "objective.log_scale" else parameter.grad
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=1e-9)
    losses = objective.predict(made.backbone, batch)["loss"]
    torch.testing.assert_close(losses.mean(), wanted, rtol=1e-6, atol=0.0)


def test_the_scale_ends_at_100():
    objective = task("clip", **SMALL).objective
    for scale in (1000.0, 30.0):
        objective.log_scale.data.fill_(math.log(scale))
        assert objective.after_step(Conv(), 0, 1) is None
        assert float(objective.log_scale.exp()) == pytest.approx(min(scale, 100.0))


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(team):
    check_ranks(team, "clip", **SMALL)


def test_a_run_that_was_stopped_ends_the_same(tmp_path):
    check_resume(tmp_path, "clip", **SMALL)


def test_a_caption_is_read_up_to_its_own_end():
    """What stands behind it, and what other rows have, changes nothing."""
    tower = task("clip", **SMALL).objective.text.eval()
    tokens = torch.tensor([[2, 5, 3, 0, 0], [2, 6, 7, 8, 3]])
    lengths = torch.tensor([3, 5])
    first, second = tower(tokens, lengths)
    torch.testing.assert_close(tower(tokens[:1, :3], lengths[:1])[0], first)
    noise = tokens.clone()
    noise[0, 3:] = 9
    torch.testing.assert_close(tower(noise, lengths), torch.stack([first, second]))
    assert (tower(tokens, torch.tensor([3, 4]))[1] - second).abs().max() > 1e-3


def test_captions_are_cut_and_empty_ones_left_out():
    words = ["A grey dog", "a dog " * 20, None, "  ", "a cat"]
    made = captioned(words, length=8)
    table = pa.table({"words": words})
    found = CLIP.encode(table, COLUMNS, made.state)["caption"]
    assert [len(row) for row in found[[1, 2]]] == [8, 2] and found[0][-1] == found[1][-1]
    assert CLIP.encode(pa.table({"words": ["a grey DOG"]}), COLUMNS, made.state)["caption"][
        0
    ].tolist() == (found[0].tolist())
    reasons = CLIP.invalid_label_reasons(table, COLUMNS, made.state)
    assert reasons == ["", "", "the caption is empty", "the caption is empty", ""]
    assert CLIP.encode(table.rename_columns(["other"]), COLUMNS, made.state) == {}
    assert CLIP.roles == ("caption",) and isinstance(made, CouplesRows)


def test_other_captions_of_an_image_are_not_wrong():
    """The loss of a row is that of a batch without the other rows of its image."""
    made, batch = task("clip", **SMALL), some(5, ())
    table = pa.table({"words": ["a", "b", "a", "c", "b"], "photo": ["x", None, "y", "x", None]})
    columns = {"caption": "words", "image_id": "photo"}
    fitted = captioned(table["words"].to_pylist())
    arrays = CLIP.encode(table, columns, fitted.state)
    image, caption = arrays["image_number"], arrays["caption_number"]
    assert image[0] == image[3] >= 0 and image[2] not in (-1, image[0])
    assert image[[1, 4]].tolist() == [-1, -1], "rows without an id are images of their own"
    assert caption[0] == caption[2] != caption[1] == caption[4] and len(set(caption)) == 3
    batch = batch.replace(image_number=torch.from_numpy(image))
    found = made.objective.predict(made.backbone, batch)
    for row, others in ((0, [0, 1, 2, 4]), (3, [1, 2, 3, 4])):
        rows, captions = (found[f"{n}_embedding"][others] for n in ("image", "caption"))
        scores = made.objective.log_scale.exp() * rows @ captions.T
        own = others.index(row)
        both = [-one.log_softmax(0)[own] for one in (scores[own], scores[:, own])]
        torch.testing.assert_close(found["loss"][row], sum(both) / 2)
    torch.testing.assert_close(made(batch)[0], found["loss"].sum())
    alone = batch.replace(image_number=torch.full((5,), -1))
    assert made.objective.predict(made.backbone, alone)["loss"][0] > found["loss"][0]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1, 2], "column words: it holds int64 values; a caption is one text a row"),
        ([["a", "b"]], r"column words: it holds list<.*> values; a caption is one text a row"),
        ([None, ""], "column words: no row holds a caption"),
    ],
)
def test_other_columns_are_refused(column, message):
    with pytest.raises(ValueError, match=message):
        CLIP.fit(CLIPOptions(), pa.table({"words": column}), COLUMNS)


def test_heads_share_the_width():
    with pytest.raises(ValueError, match="width: 10 must be a multiple of heads: 4"):
        CLIPOptions(width=10)


def test_texts_about_classes_score_rows_by_their_cosines():
    made, backbone = captioned(["a dog", "a cat", "a bird"]), Conv()
    backbone.block.weight.data *= 20  # the norm's epsilon counts for nothing beside the features
    target = Classification(
        backbone, ClassificationOptions(), {"values": [0, 1], "labels": ["dog", "cat"]}
    )
    assert isinstance(made, ReadsTexts)
    assert label_sets.head_of_texts(
        target, made, ZeroShot(ZeroShotOptions(prompt="a {}")).class_texts
    ) == (
        2,
        "head: 2 classes by texts such as 'a dog'",
    )
    batch = some(5, ())
    del batch.data["caption"]  # as in new rows
    embedding = made.predict(backbone, batch)["embedding"]
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))
    captions = CLIP.encode(pa.table({"words": ["a dog", "a cat"]}), COLUMNS, made.state)["caption"]
    tokens = torch.from_numpy(np.stack(captions))
    texts = made.text(tokens, torch.full((2,), tokens.shape[1]))
    texts = F.normalize(texts - texts.mean(1, keepdim=True), dim=1)
    cosines = embedding @ texts.T
    scores = target.predict(backbone, batch)["scores"]
    torch.testing.assert_close(scores, cosines * made.log_scale.exp(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multilabel", {}, "and the target is multilabel"),
        ("verification", {}, "and the target is verification"),
        ("classification", {"norm": False}, "leave norm: false out"),
    ],
)
def test_other_heads_cannot_be_made_of_texts(name, options, message):
    kind = registry.get("objective", name)
    labels = {"values": [0, 1], "labels": ["a", "b"]}
    state = {"identities": [0, 1]} if name == "verification" else labels
    target = kind(Conv(), kind.options_class(**options), state)
    count, text = label_sets.head_of_texts(target, captioned(["a", "b"]), list)
    assert count == 0 and text.startswith("new head: ") and message in text
