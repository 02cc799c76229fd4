"""The four families of transformers: their own states on padded and on packed rows, poolers,
layers, what is refused.
"""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from toys import SMALL

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture

VOCABULARY, LENGTH, PAD = 50, 24, 1
INPUTS = {"vocabulary": VOCABULARY, "length": LENGTH, "specials": [PAD, 3, 0, 2, 4]}
"""Ids as RoBERTa has them: padding is not 0."""
MODELS = {
    "bert": hf.BertModel,
    "roberta": hf.RobertaModel,
    "distilbert": hf.DistilBertModel,
    "gpt2": hf.GPT2Model,
}
SIZES = ((9, 10, 5), (24,), (3, 17), (11,))


def build(family: str, **options):
    options = {**SMALL, **({} if "config" in options else {"layers": 3}), **options}
    return bundle.build_backbone(
        Architecture(f"transformers/{family}", options, INPUTS), seed=2
    ).eval()


def shaken(backbone):
    """With vectors that are not what they begin as: a norm or a padding row left out would else go
    unseen.
    """
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return backbone


def reference(backbone):
    """transformers' own model with the same weights, and a pooler of its own where the backbone has
    none.
    """
    config = type(backbone.model.config).from_dict(
        json.loads(json.dumps(backbone.model.config.to_dict()))
    )
    model = MODELS[backbone.architecture](config).eval()
    missing, unexpected = model.load_state_dict(backbone.model.state_dict(), strict=False)
    assert (
        not unexpected
        and set(missing) <= {"pooler.dense.weight", "pooler.dense.bias"}
        and (backbone.pool != "pooler" or not missing)
    )
    return model


def batch(**tensors) -> Batch:
    n = len(tensors["tokens"])
    return Batch(np.arange(n), torch.arange(n), tensors)


def padded(sizes) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
    return torch.where(mask, torch.randint(5, VOCABULARY, mask.shape), PAD), mask


@pytest.fixture(params=MODELS)
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_padded_rows_have_the_states_of_transformers(family):
    backbone = shaken(build(family))
    tokens, mask = padded((12, 24, 1, 7))
    found = backbone(batch(tokens=tokens, mask=mask))
    want = reference(backbone)(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    assert (found.tokens - want)[mask].abs().max() < 1e-5 and torch.equal(found.mask, mask)
    whole = backbone(batch(tokens=tokens[1:2]))  # no mask: all of it is text
    assert (whole.tokens - want[1:2]).abs().max() < 1e-5


@torch.no_grad()
def test_packed_documents_have_the_states_that_transformers_gives_each_alone(family):
    backbone = shaken(build(family))
    torch.manual_seed(4)
    tokens, segments = (
        torch.full((len(SIZES), LENGTH), PAD),
        torch.zeros(len(SIZES), LENGTH, dtype=torch.int32),
    )
    places = []
    for row, sizes in enumerate(SIZES):
        ends = np.cumsum(sizes)
        for number, (end, size) in enumerate(zip(ends, sizes, strict=True), 1):
            here = slice(int(end) - size, int(end))
            tokens[row, here], segments[row, here] = torch.randint(5, VOCABULARY, (size,)), number
            places.append((row, here))
    found, model = backbone(batch(tokens=tokens, segments=segments)).tokens, reference(backbone)
    for row, here in places:
        assert (
            found[row, here] - model(input_ids=tokens[row : row + 1, here]).last_hidden_state[0]
        ).abs().max() < 1e-5


@torch.no_grad()
def test_token_types_are_read_where_there_are_several(family):
    backbone = shaken(build(family))
    tokens, mask = padded((12, 24, 9))
    types = (torch.arange(tokens.shape[1])[None] >= torch.tensor([5, 20, 3])[:, None]).to(
        torch.uint8
    ) * mask.to(torch.uint8)
    with_types, without = (
        backbone(batch(tokens=tokens, mask=mask, **more)).tokens for more in ({"types": types}, {})
    )
    if family == "bert":
        want = reference(backbone)(
            input_ids=tokens, attention_mask=mask.long(), token_type_ids=types.long()
        ).last_hidden_state
        assert (with_types - want)[mask].abs().max() < 1e-5 and (with_types - without)[
            mask
        ].abs().max() > 0.05
    else:
        assert torch.equal(with_types, without)
    assert backbone.has_types == (family == "bert")


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_pooler_is_the_familys_own(family):
    backbone = shaken(build(family, pool="pooler"))
    tokens, mask = padded((12, 24, 1, 7))
    want = reference(backbone)(input_ids=tokens, attention_mask=mask.long())
    found = backbone(batch(tokens=tokens, mask=mask))
    assert (found.pooled - want.pooler_output).abs().max() < 1e-5 and found.pooled.shape == (
        4,
        backbone.pooled_dim,
    )
    assert (
        backbone.layers()["pooler"] == ["model.pooler.dense.weight", "model.pooler.dense.bias"]
        and list(backbone.layers())[-1] == "pooler"
    )
    assert "pooler" not in build(family).layers() and not any(
        "pooler" in name for name in build(family).state_dict()
    )


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_families_without_a_pooler_say_so(family):
    with pytest.raises(
        ValueError, match=f"transformers/{family} has no pooler: set pool to mean, first or last"
    ):
        build(family, pool="pooler")


def test_layers_are_in_order_and_hold_each_parameter_once(family):
    for pool in ("auto", *(["pooler"] if family in ("bert", "roberta") else [])):
        backbone = build(family, layers=12, pool=pool)
        layers = backbone.layers()
        ends = {"gpt2": ["norm"]}.get(family, []) + (["pooler"] if pool == "pooler" else [])
        assert list(layers) == ["embeddings", *[f"block{i:02d}" for i in range(12)], *ends]
        assert sorted(name for names in layers.values() for name in names) == sorted(
            name for name, _ in backbone.named_parameters()
        )
        assert len({len(layers[f"block{i:02d}"]) for i in range(12)}) == 1


def test_the_embedding_is_that_of_the_tokens(family):
    embedding = build(family).embedding()
    assert embedding.num_embeddings == VOCABULARY and embedding.embedding_dim == SMALL["hidden"]
    assert embedding.padding_idx == (None if family == "gpt2" else PAD)


@torch.no_grad()
def test_a_whole_configuration_gives_the_same_model(family):
    first = build(family)
    again = build(family, config=json.loads(json.dumps(first.model.config.to_dict())))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in first.state_dict().items()
    }
    again.load_state_dict(first.state_dict())
    tokens, mask = padded((12, 24))
    assert torch.equal(
        again(batch(tokens=tokens, mask=mask)).pooled, first(batch(tokens=tokens, mask=mask)).pooled
    )
    assert again.arch.options["config"]["model_type"] == family


def test_the_length_must_fit_the_positions():
    """RoBERTa keeps the positions up to padding's for itself: 514 take 512 tokens, as published."""
    config = build("roberta").model.config.to_dict()
    assert (
        config["max_position_embeddings"] == LENGTH + PAD + 1
        and build("roberta", positions=30).positions == 30
    )
    with pytest.raises(
        ValueError,
        match=r"rows of 24 tokens are longer than the 22 positions of roberta \(the first 2 of "
        r"its 24 are for padding\)",
    ):
        build("roberta", config={**config, "max_position_embeddings": LENGTH})
    for family in ("bert", "distilbert"):
        assert build(family).positions == LENGTH
        with pytest.raises(
            ValueError, match=f"rows of 24 tokens are longer than the 16 positions of {family}"
        ):
            build(family, positions=16)


def test_roberta_needs_its_own_padding():
    config = build("roberta").model.config.to_dict()
    with pytest.raises(
        ValueError,
        match="the tokenizer pads with token 1, roberta's configuration with pad_token_id 5",
    ):
        build("roberta", config={**config, "pad_token_id": 5})


def test_a_tokenizer_larger_than_the_embedding_is_refused(family):
    config = build(family).model.config.to_dict()
    with pytest.raises(
        ValueError, match=f"the tokenizer has 50 tokens, the embedding of {family} 40"
    ):
        build(family, config={**config, "vocab_size": 40})


@torch.no_grad()
def test_steps_with_kept_keys_and_values_give_the_states_of_the_whole():
    """Left padding, as generation has it."""
    backbone = shaken(build("gpt2"))
    tokens, _ = padded((10, 10))
    mask = torch.arange(10)[None] >= torch.tensor([[3], [0]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    first, past = backbone.advance(tokens[:, :6], mask[:, :6], positions[:, :6])
    parts = [first]
    for at in range(6, 10):
        state, past = backbone.advance(
            tokens[:, at : at + 1], mask[:, : at + 1], positions[:, at : at + 1], past
        )
        parts.append(state)
    found = torch.cat(parts, dim=1)
    assert (found[0, 3:] - backbone(batch(tokens=tokens[:1, 3:])).tokens[0]).abs().max() < 1e-5
    assert (found[1] - backbone(batch(tokens=tokens[1:])).tokens[0]).abs().max() < 1e-5
