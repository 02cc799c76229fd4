"""Documents packed into one row are as if each stood alone: states, losses and gradients. Rows of
one shape compile once.
"""

import base64

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toys import task_of

from pipeline.core.contracts import Batch, Task
from pipeline.models.hf import documents_by_length
from pipeline.models.transformers import document_mask, restarted_positions

LENGTH, VOCABULARY = 32, 60
INPUTS = {"vocabulary": VOCABULARY, "length": LENGTH, "specials": [0, 1, 2, 3, 4]}
SIZES = ((9, 14, 5), (32,), (3, 29), (20,))
"""Lengths of the documents of each row; the first and the last row end in padding."""
FAMILIES = ("bert", "roberta", "distilbert", "gpt2")


def make(architecture: str) -> Task:
    objective = "clm" if architecture == "gpt2" else "mlm"
    return task_of(
        f"transformers/{architecture}",
        INPUTS,
        objective,
        seed=3,
        layers=3,
        hidden=32,
        heads=4,
        dropout=0.0,
    ).eval()


@pytest.fixture(params=FAMILIES, scope="module")
def task(request) -> Task:
    return make(request.param)


def batch(tokens: torch.Tensor, segments: torch.Tensor) -> Batch:
    return Batch(
        np.arange(len(tokens)), torch.arange(len(tokens)), {"tokens": tokens, "segments": segments}
    )


def packed(every: tuple[tuple[int, ...], ...] = SIZES) -> tuple[Batch, list[tuple[int, slice]]]:
    """Rows of random tokens, and the place (row, slice) of every document."""
    torch.manual_seed(0)
    tokens, segments = (
        torch.zeros(len(every), LENGTH, dtype=torch.long),
        torch.zeros(len(every), LENGTH, dtype=torch.int32),
    )
    places = []
    for row, sizes in enumerate(every):
        at = 0
        for number, size in enumerate(sizes, start=1):
            here = slice(at, at + size)
            tokens[row, here], segments[row, here] = torch.randint(5, VOCABULARY, (size,)), number
            places.append((row, here))
            at += size
    return batch(tokens, segments), places


def alone(whole: Batch, row: int, here: slice) -> Batch:
    """One document as a row of its own, as fine-tuning reads it: a mask and no segments."""
    tokens = whole["tokens"][row : row + 1, here]
    return Batch(
        np.zeros(1, dtype=np.int64),
        torch.zeros(1, dtype=torch.long),
        {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)},
    )


@torch.no_grad()
def test_hidden_states_are_those_of_the_documents_alone(task):
    whole, places = packed()
    hidden = task.backbone(whole).tokens
    for row, here in places:
        single = task.backbone(alone(whole, row, here)).tokens
        assert (hidden[row : row + 1, here] - single).abs().max() < 1e-5
    assert (hidden[0, :9] - hidden[0, 9:18]).abs().max() > 0.1  # and they do differ


@torch.no_grad()
def test_padding_beside_a_text_changes_nothing(task):
    """Fine-tuning rows: a mask, padding behind; tokens and what is pooled are those of the text
    alone.
    """
    whole, places = packed()
    row, here = places[0]
    single = task.backbone(alone(whole, row, here))
    tokens = torch.nn.functional.pad(whole["tokens"][row : row + 1, here], (0, 7), value=0)
    mask = torch.arange(tokens.shape[1])[None] < here.stop
    padded = task.backbone(
        Batch(
            np.zeros(1, dtype=np.int64),
            torch.zeros(1, dtype=torch.long),
            {"tokens": tokens, "mask": mask},
        )
    )
    assert (padded.tokens[:, here] - single.tokens).abs().max() < 1e-5
    assert (padded.pooled - single.pooled).abs().max() < 1e-5
    assert torch.equal(padded.mask, mask)


def test_pooling(task):
    whole, places = packed()
    row, here = places[0]
    found = task.backbone(alone(whole, row, here))
    want = found.tokens[:, -1] if task.backbone.causal else found.tokens.mean(1)
    torch.testing.assert_close(found.pooled, want)


def test_no_gradient_crosses_documents(task):
    """Of the inputs' embeddings, only a document's own move its states; causal ones only what
    stands before.
    """
    whole, places = packed()
    embedded = []
    hook = task.backbone.embedding().register_forward_hook(
        lambda module, args, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]
    )
    try:
        hidden = task.backbone(whole).tokens
    finally:
        hook.remove()
    for row, here in places:
        for at in {here.start, (here.start + here.stop) // 2, here.stop - 1}:
            (gradient,) = torch.autograd.grad(
                hidden[row, at].sum() + hidden[row, at, 0], embedded[0], retain_graph=True
            )
            reached = gradient.abs().sum(-1) > 0
            want = torch.zeros_like(reached)
            want[row, here.start : (at + 1 if task.backbone.causal else here.stop)] = True
            assert torch.equal(reached, want)


@torch.no_grad()
def test_a_document_does_not_depend_on_its_neighbours(task):
    whole, places = packed()
    before = task.backbone(whole).tokens
    row, here = places[1]
    tokens = whole["tokens"].clone()
    outside = torch.ones_like(tokens, dtype=torch.bool)
    outside[row, here] = False
    tokens[outside] = torch.randint(5, VOCABULARY, (int(outside.sum()),))
    after = task.backbone(whole.replace(tokens=tokens)).tokens
    assert (after[row, here] - before[row, here]).abs().max() < 1e-5
    assert (after[row, : here.start] - before[row, : here.start]).abs().max() > 0.1


def test_causal_loss_is_the_sum_of_the_documents_losses():
    task = make("gpt2")
    whole, places = packed()
    total, count, _ = task(whole)
    want, n = torch.zeros(()), 0
    for row, here in places:
        single = alone(whole, row, here)
        scores = task.backbone(single).tokens[0, :-1] @ task.backbone.embedding().weight.T
        want = want + torch.nn.functional.cross_entropy(
            scores, single["tokens"][0, 1:], reduction="sum"
        )
        n += here.stop - here.start - 1
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-4)
    assert count == n
    found = task.objective.predict(task.backbone, whole)
    torch.testing.assert_close(found["loss"].sum(), want, rtol=1e-5, atol=1e-4)
    assert found["count"].tolist() == [sum(size - 1 for size in sizes) for sizes in SIZES]


def test_gradients_of_packed_rows_are_those_of_the_documents():
    """Of every parameter."""
    task = make("gpt2")
    whole, places = packed()
    task(whole)[0].backward()
    packed_gradient = {
        name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None
    }
    task.zero_grad()
    for row, here in places:
        tokens = whole["tokens"][row : row + 1, here]
        task(batch(tokens, torch.ones_like(tokens)))[0].backward()
    for name, p in task.named_parameters():
        assert p.grad is not None and (p.grad - packed_gradient[name]).abs().max() < 1e-4 * max(
            1.0, float(p.grad.abs().max())
        )


@pytest.mark.parametrize("architecture", FAMILIES[:3])
def test_masked_loss_is_that_of_the_documents_alone(architecture):
    """The masks of the packed row, put by hand into each document."""
    task = make(architecture)
    whole, places = packed()
    chosen, valid, tokens = task.objective.chosen_positions(whole)
    total, count, _ = task(whole)
    picked = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, chosen, valid)
    want = torch.zeros(())
    for row, here in places:
        single = alone(whole.replace(tokens=tokens), row, here)
        scores = torch.nn.functional.linear(
            task.objective.transform(task.backbone(single).tokens[0]),
            task.backbone.embedding().weight,
            task.objective.bias,
        )
        losses = torch.nn.functional.cross_entropy(
            scores, whole["tokens"][row, here], reduction="none"
        )
        want = want + losses[picked[row, here]].sum()
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-4)
    assert count == picked.sum() and not picked[whole["segments"] == 0].any()


def test_documents_of_about_one_length_are_run_together():
    """Those of library hf: each is there once, and at most every second position is padding."""
    whole, places = packed(((9, 14, 5, 4), (32,), (1, 31), (18, 2)))
    found: dict[int, tuple[int, int]] = {}
    for index, real in documents_by_length(whole["segments"]):
        size = index.shape[1]
        for where, own in zip(index, real, strict=True):
            found[int(where[0])] = (int(own.sum()), size)
            assert where[own].tolist() == list(range(int(where[0]), int(where[0]) + int(own.sum())))
            assert size < 2 * own.sum() or size == 16
    want = {row * LENGTH + here.start: here.stop - here.start for row, here in places}
    assert {start: length for start, (length, _) in found.items()} == want
    assert {size for _, size in found.values()} == {16, 32}
    (index, real), *others = documents_by_length(torch.zeros(2, 5, dtype=torch.int32))
    assert real.all() and index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and not others


def test_mask_and_positions_by_hand():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0]])
    assert restarted_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    both = document_mask(segments, causal=False)[0, 0].int().tolist()
    assert (
        both
        == [[1, 1, 0, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 0, 0, 1, 1]] * 2
    )
    causal = document_mask(segments, causal=True)[0, 0]
    assert (
        torch.equal(causal, document_mask(segments, causal=False)[0, 0].tril())
        and causal.any(1).all()
    )
    assert restarted_positions(torch.tensor([[3, 3, 1, 1], [1, 2, 1, 1]])).tolist() == [
        [0, 1, 0, 1],
        [0, 0, 0, 1],
    ]


@torch.no_grad()
@pytest.mark.parametrize("architecture", FAMILIES)
def test_positions_restart_with_every_document(architecture):
    """What the model's own table of positions is asked for; RoBERTa counts from the one behind
    padding's.
    """
    task = make(architecture)
    (table,) = [
        module
        for name, module in task.backbone.model.named_modules()
        if name.endswith(("position_embeddings", "wpe"))
    ]
    asked = []
    table.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    whole, places = packed()
    task.backbone(whole)
    first = 1 if architecture == "roberta" else 0  # padding's id is 0 here
    for row, here in places:
        assert asked[0][row, here].tolist() == list(range(first, first + here.stop - here.start))
    if architecture == "roberta":
        assert not asked[0][whole["segments"] == 0].any()
    row, here = places[0]
    task.backbone(alone(whole, row, here))
    assert asked[1].expand(1, -1)[0].tolist() == asked[0][row, here].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("bert", {"whole_word": True}),
        ("gpt2", {}),
        *[
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in ("bert", "roberta", "distilbert")
        ],
    ],
)
def test_rows_of_one_shape_compile_once(architecture, objective):
    """Whatever rows they are and however long their documents: training steps with dropout, without
    a break in the graph.
    """
    inputs = {
        **INPUTS,
        "continuing": base64.b64encode(np.packbits(np.arange(VOCABULARY) % 3 == 2)).decode(),
    }
    task = task_of(
        f"transformers/{architecture}",
        inputs,
        "clm" if architecture == "gpt2" else "mlm",
        seed=3,
        options=objective,
        layers=1,
        hidden=16,
        heads=2,
        dropout=0.1,
    )
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(task, dynamic=False, backend=backend, fullgraph=True)
    for step, sizes in enumerate(
        (
            SIZES,
            ((1, 1, 30), (2, 2), (8, 8, 8, 8), (31,)),
            ((32,), (32,), (32,), (32,)),
            ((5,), (4, 4), (3, 3, 3), (2,)),
        )
    ):
        whole, _ = packed(sizes)
        total, count, _ = compiled(
            Batch(whole.rows + 7 * step, whole.keys * 5 + step, whole.data, whole.rows % 3)
        )
        total.backward()
        assert torch.isfinite(total) and count > 0
    assert backend.frame_count == 1
    task.eval(), compiled.eval()
    torch.testing.assert_close(compiled(packed()[0])[0], task(packed()[0])[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "objective", "message"),
    [
        (
            "gpt2",
            "mlm",
            "transformers/gpt2 is causal: masked prediction needs a bidirectional backbone",
        ),
        (
            "bert",
            "clm",
            "transformers/bert sees the future: causal prediction needs transformers/gpt2",
        ),
    ],
)
def test_an_objective_that_does_not_fit_says_so(architecture, objective, message):
    with pytest.raises(ValueError, match=message):
        task_of(f"transformers/{architecture}", INPUTS, objective, layers=1, hidden=16, heads=2)


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        (
            "transformers/bert",
            {"channels": 3, "size": 32},
            {},
            "transformers/bert reads text; these rows are channels, size",
        ),
        ("transformers/bert", INPUTS, {"hidden": 30, "heads": 4}, "heads 4 must divide hidden 30"),
        (
            "transformers/gpt2",
            INPUTS,
            {"positions": 16},
            "rows of 32 tokens are longer than the 16 positions of gpt2",
        ),
        (
            "transformers/bert",
            INPUTS,
            {
                "config": {
                    "vocab_size": 50,
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                }
            },
            "the tokenizer has 60 tokens, the embedding of bert 50",
        ),
        (
            "transformers/bert",
            INPUTS,
            {
                "config": {
                    "is_decoder": True,
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                }
            },
            "transformers/bert: the configuration says is_decoder: true",
        ),
        (
            "timm/test_resnet",
            INPUTS,
            {},
            "timm/test_resnet reads images; these rows are vocabulary, length, specials",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(name, inputs, "mlm", **options)


def test_an_embedding_that_cannot_be_the_output_is_refused():
    config = {"is_decoder": True, "hidden_size": 16, "embedding_size": 12}
    config |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="hf/electra: its states have 16 numbers, its token embed"):
        task_of("hf/electra", INPUTS, "clm", config=config)


def test_images_have_no_language_model():
    with pytest.raises(
        ValueError,
        match="timm/test_resnet has no token embedding: language-model objectives need a text "
        "backbone",
    ):
        task_of("timm/test_resnet", {"channels": 3, "size": 32}, "mlm")
