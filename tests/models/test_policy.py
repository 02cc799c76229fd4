"""Backbones of policies: who knows what by gradients, pieces and padding against rows alone, GPT-2
against transformers, what goes over to a new robot.
"""

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from toys import TRAJECTORY_COLUMNS, episodes, furthest, take, task_of, trajectory_rows, weights

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.models.policy import ONLY_OF

INPUTS = {
    "spaces": {
        "arm": {"observation": 3, "action": 2, "discrete": False},
        "cart": {"observation": 2, "action": 1, "discrete": False},
    },
    "tasks": 2,
    "images": None,
}
SMALL = {"width": 16, "heads": 2}
KINDS = ("mlp", "transformer")


def built(name: str, inputs=None, seed: int = 3, **options):
    given = {**SMALL, **options}
    own = {option: value for option, value in given.items() if ONLY_OF.get(option, name) == name}
    return bundle.build_backbone(
        Architecture(f"policy/{name}", own, inputs or INPUTS), seed=seed
    ).eval()


def batch_of(lengths, spaces=None, seed: int = 0, actions: bool = True, inputs=None) -> Batch:
    """Random rows of so many steps; numbers beyond a row's space are noughts, as the modality
    leaves them.
    """
    g = torch.Generator().manual_seed(seed)
    inputs = inputs or INPUTS
    spaces, sizes = spaces or [0] * len(lengths), list(inputs["spaces"].values())
    most = [max(size[key] for size in sizes) for key in ("observation", "action")]
    steps = max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    data = {
        "mask": mask,
        "space": torch.tensor(spaces),
        "task": torch.arange(len(lengths)) % (inputs["tasks"] + 1),
    }
    for name, width in zip(
        ("observations", "actions") if actions else ("observations",), most, strict=False
    ):
        real = torch.tensor(
            [[k < sizes[space][name[:-1]] for k in range(width)] for space in spaces]
        )
        data[name] = (
            torch.randn(len(lengths), steps, width, generator=g) * mask[..., None] * real[:, None]
        )
    return Batch(np.arange(len(lengths)), torch.arange(len(lengths)), data)


def rows_of(batch: Batch, rows, steps: slice = slice(None)) -> Batch:
    data = {name: tensor[rows] for name, tensor in batch.data.items()}
    return Batch(
        batch.rows[rows],
        batch.keys[rows],
        {name: tensor[:, steps] if tensor.dim() > 1 else tensor for name, tensor in data.items()},
    )


# ---------------------------------------------------------------- what a token knows


@pytest.mark.parametrize(
    ("name", "options", "reach"),
    [
        ("mlp", {"window": 1}, 1),
        ("mlp", {"window": 3, "layers": 3}, 3),
        ("transformer", {"context": 9}, 9),
        ("transformer", {"context": 4}, 4),
    ],
)
def test_a_token_knows_observations_until_its_step_and_actions_before_it(name, options, reach):
    """By gradients: of each token with respect to every observation and every action; of the pieces
    of a transformer, its own.
    """
    backbone, batch = built(name, **options), batch_of([9, 9])
    seen, done = (batch[key].clone().requires_grad_() for key in ("observations", "actions"))
    tokens = backbone(batch.replace(observations=seen, actions=done)).tokens
    for t in range(9):
        moved = torch.autograd.grad(
            (tokens[:, t] * torch.randn(16)).sum(),
            (seen, done),
            retain_graph=True,
            allow_unused=True,
        )
        start = t // reach * reach if name == "transformer" else max(0, t - reach + 1)
        knows = [
            grad.abs().amax((0, 2)) > 0 if grad is not None else torch.zeros(9, dtype=torch.bool)
            for grad in moved
        ]
        assert knows[0].tolist() == [start <= s <= t for s in range(9)]
        assert knows[1].tolist() == [start <= s < t and name == "transformer" for s in range(9)]


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_task_and_history_matter_to_the_tokens(name):
    backbone, batch = built(name, window=3), batch_of([6, 6, 6])
    whole = backbone(batch).tokens
    other = backbone(batch.replace(task=torch.tensor([1, 1, 0]))).tokens
    assert (other[1] == whole[1]).all() and (other - whole).abs().amax((1, 2))[[0, 2]].min() > 1e-4
    late = backbone(rows_of(batch, [0], slice(2, None))).tokens
    assert (late[:, 0] - whole[:1, 2]).abs().max() > 1e-4


# ---------------------------------------------------------------- padding, pieces, spaces


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {"window": 4}), ("transformer", {"context": 30}), ("transformer", {"context": 5})],
)
def test_padding_and_neighbours_never_change_a_rows_tokens(name, options):
    """Whatever stands behind a row's end, and in the numbers that its space has not."""
    backbone, lengths = built(name, **options), [13, 1, 5, 8, 11]
    batch = batch_of(lengths, [0, 1, 0, 1, 1])
    whole = backbone(batch)
    noise = torch.Generator().manual_seed(5)
    dirty = batch.replace(
        **{
            key: torch.where(
                batch["mask"][..., None] & (batch[key] != 0),
                batch[key],
                torch.randn(batch[key].shape, generator=noise),
            )
            for key in ("observations", "actions")
        }
    )
    for found in (whole, backbone(dirty)):
        assert not found.tokens[~batch["mask"]].any()
        for i, n in enumerate(lengths):
            alone = backbone(rows_of(batch, [i], slice(n)))
            torch.testing.assert_close(found.tokens[i, :n], alone.tokens[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                found.pooled[i], found.tokens[i, :n].mean(0), rtol=1e-5, atol=1e-5
            )


@torch.no_grad()
@pytest.mark.parametrize("context", [1, 4, 13])
def test_long_rows_are_their_pieces_alone(context):
    backbone, lengths = built("transformer", context=context), [13, 2, 9]
    batch = batch_of(lengths, [0, 1, 0])
    whole = backbone(batch).tokens
    assert whole.shape == (3, 13, 16)
    for i, n in enumerate(lengths):
        for start in range(0, n, context):
            stop = min(n, start + context)
            piece = backbone(rows_of(batch, [i], slice(start, stop))).tokens
            torch.testing.assert_close(whole[i, start:stop], piece[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_several_spaces_are_as_each_space_alone(name):
    """Also against a backbone that has the one space only, with the same weights."""
    backbone, spaces = built(name, window=2), [1, 0, 1, 1, 0]
    batch = batch_of([6, 4, 6, 2, 5], spaces)
    whole = backbone(batch).tokens
    for number, space in enumerate(INPUTS["spaces"]):
        rows = [i for i, other in enumerate(spaces) if other == number]
        size = INPUTS["spaces"][space]
        single = built(name, {**INPUTS, "spaces": {space: size}}, seed=9, window=2)
        single.load_state_dict(
            {
                key: tensor
                for key, tensor in backbone.state_dict().items()
                if key in single.state_dict()
            }
        )
        part = rows_of(batch, rows)
        narrow = part.replace(
            space=torch.zeros(len(rows), dtype=torch.long),
            observations=part["observations"][..., : size["observation"]],
            actions=part["actions"][..., : size["action"]],
        )
        for found in (backbone(part).tokens, single(narrow).tokens):
            torch.testing.assert_close(found, whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("missing", ["space", "actions"])
def test_every_parameter_has_a_gradient_where_a_batch_lacks_something(name, missing):
    """DDP waits for all of them; noughts for those that took no part."""
    backbone = built(name, context=4).train()
    backbone(
        batch_of([5, 3], [1, 1] if missing == "space" else [0, 1], actions=missing != "actions")
    ).pooled.sum().backward()
    assert [
        n
        for n, p in backbone.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ] == []
    still = {n for n, p in backbone.named_parameters() if not p.grad.any()}
    expected = {
        "space": ("encoders.arm.", "action_encoders.arm."),
        "actions": ("action_encoders.",),
    }[missing]
    assert still == {n for n, _ in backbone.named_parameters() if n.startswith(expected)}


# ---------------------------------------------------------------- against other implementations


@torch.no_grad()
def test_the_transformer_is_that_of_transformers():
    """The published model's own forward, with a vocabulary of its own, on embeddings made here step
    by step.
    """
    backbone, batch = built("transformer", context=8, layers=3), batch_of([8, 8, 8], [0, 1, 0])
    model = hf.GPT2Model(
        hf.GPT2Config(vocab_size=7, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    ).eval()
    missing = model.load_state_dict(backbone.body.model.state_dict(), strict=False)
    assert missing.missing_keys == ["wte.weight"] and not missing.unexpected_keys
    held = backbone.state_dict()
    for i in range(3):
        space, steps = ("arm", "cart", "arm")[i], []
        size = INPUTS["spaces"][space]
        for t in range(8):
            e = (
                held[f"encoders.{space}.weight"]
                @ batch["observations"][i, t, : size["observation"]]
                + held[f"encoders.{space}.bias"]
            )
            e = e + held["tasks.weight"][batch["task"][i]]
            if t:
                e = (
                    e
                    + held[f"action_encoders.{space}.weight"]
                    @ batch["actions"][i, t - 1, : size["action"]]
                    + held[f"action_encoders.{space}.bias"]
                )
            steps.append(e)
        want = model(inputs_embeds=torch.stack(steps)[None]).last_hidden_state[0]
        torch.testing.assert_close(backbone(batch).tokens[i], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mlp_is_what_a_loop_makes():
    backbone, batch = built("mlp", window=3, layers=2), batch_of([7], [1])
    held = backbone.state_dict()
    seen = [
        F.gelu(
            held["encoders.cart.weight"] @ o[:2]
            + held["encoders.cart.bias"]
            + held["tasks.weight"][0]
        )
        for o in batch["observations"][0]
    ]
    for t in range(7):
        x = torch.cat([seen[s] if s >= 0 else torch.zeros(16) for s in (t - 2, t - 1, t)])
        for i in range(2):
            x = F.gelu(held[f"body.blocks.{i}.0.weight"] @ x + held[f"body.blocks.{i}.0.bias"])
        torch.testing.assert_close(backbone(batch).tokens[0, t], x, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what goes over to another robot


def with_spaces(tasks: int = 2, **spaces: tuple[int, int]):
    return {
        "spaces": {
            name: {"observation": o, "action": a, "discrete": False}
            for name, (o, a) in spaces.items()
        },
        "tasks": tasks,
        "images": None,
    }


def trunk(backbone) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in weights(backbone).items()
        if not name.startswith(("encoders.", "action_encoders.", "tasks."))
    }


@pytest.mark.parametrize("name", KINDS)
def test_another_robot_keeps_the_trunk_bit_for_bit_and_says_so(name):
    source = built(name, with_spaces(tasks=2, arm=(3, 2), cart=(2, 1)), seed=1)
    target = built(name, with_spaces(tasks=4, arm=(3, 2), o11a3=(11, 3)), seed=2)
    fresh = weights(target)
    assert furthest(trunk(source), trunk(target)) > 0
    moved = bundle.transfer(target, source.state_dict(), "source")
    assert furthest(trunk(source), trunk(target)) == 0
    parts = ["encoders"] if name == "mlp" else ["encoders", "action_encoders"]
    message = [words for part in parts for words in (f"{part}.o11a3 new", f"{part}.cart dropped")]
    assert moved.text().endswith(
        "; ".join(["0 dropped", *message, "tasks: 2 kept, 2 new", "trunk kept"])
    )
    theirs, mine = source.state_dict(), target.state_dict()
    for part in parts:
        for tensor in ("weight", "bias"):
            assert torch.equal(mine[f"{part}.arm.{tensor}"], theirs[f"{part}.arm.{tensor}"])
            assert torch.equal(mine[f"{part}.o11a3.{tensor}"], fresh[f"{part}.o11a3.{tensor}"])
    assert torch.equal(mine["tasks.weight"][:3], theirs["tasks.weight"]) and torch.equal(
        mine["tasks.weight"][3:], theirs["tasks.weight"][1:3].mean(0, keepdim=True).expand(2, -1)
    ), "a new task begins as the mean of the known ones"


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_grown_modality_and_its_source_agree_on_what_the_source_knew(name):
    """Through modality and bundle: the source's rows give the same tokens in the grown model, the
    new robot's rows go through its own encoders.
    """
    options, table = TrajectoryOptions(), episodes(8)
    modality = Trajectory(options, Trajectory.fit(options, table, TRAJECTORY_COLUMNS, ""))
    new = (
        episodes(4, seed=7)
        .set_column(3, "embodiment", [["walker"] * 4])
        .take([0, 2])
        .set_column(2, "task", [["turn"] * 2])
    )
    grown = Trajectory(options, modality.extend_state(new, TRAJECTORY_COLUMNS))
    source, target = built(name, modality.inputs(), seed=1), built(name, grown.inputs(), seed=2)
    moved = bundle.transfer(target, source.state_dict(), "source")
    assert (
        "encoders.walker new" in moved.text() and "tasks: 2 kept, 1 new; trunk kept" in moved.text()
    )
    before, after = (
        take(trajectory_rows(8, table, one), np.arange(8)) for one in (modality, grown)
    )
    torch.testing.assert_close(source(before).tokens, target(after).tokens, rtol=0, atol=0)
    assert take(trajectory_rows(2, new, grown), [0, 1])["space"].tolist() == [2, 2]


def test_a_space_of_the_same_name_and_other_widths_is_new():
    source, target = (
        built("transformer", with_spaces(arm=sizes), seed=seed)
        for seed, sizes in ((1, (3, 2)), (2, (4, 2)))
    )
    fresh, acts = (
        weights(target)["encoders.arm.weight"],
        source.state_dict()["action_encoders.arm.weight"],
    )
    moved = bundle.transfer(target, source.state_dict(), "source")
    assert moved.changed == ("encoders.arm new (3 numbers there, 4 here)", "trunk kept")
    assert torch.equal(target.state_dict()["encoders.arm.weight"], fresh) and torch.equal(
        target.state_dict()["action_encoders.arm.weight"], acts
    )


def test_another_trunk_is_refused():
    with pytest.raises(BundleError, match="does not fit policy/transformer"):
        bundle.transfer(
            built("transformer", with_spaces(leg=(4, 1)), layers=3),
            built("transformer", layers=2).state_dict(),
            "source",
        )
    with pytest.raises(BundleError, match="does not fit policy/mlp"):
        bundle.transfer(built("mlp", window=2), built("mlp", window=3).state_dict(), "source")


# ---------------------------------------------------------------- frames

FRAMES = {**INPUTS, "images": [3, 32, 32]}


def with_frames(batch: Batch, seed: int = 1) -> Batch:
    images = torch.randint(
        0,
        256,
        (*batch["mask"].shape, 3, 32, 32),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )
    return batch.replace(images=images)


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_seen_by_a_vision_backbone(name):
    """In training too: what lies behind a row's end is not looked at, so it is no part of the
    norm's statistics.
    """
    backbone = built(name, FRAMES, vision="timm/test_resnet", window=2)
    batch = with_frames(batch_of([3, 5], [0, 1]))
    tokens = backbone(batch).tokens
    other = batch.replace(
        images=torch.where(
            batch["mask"][..., None, None, None], batch["images"], 255 - batch["images"]
        )
    )
    assert not torch.equal(other["images"], batch["images"])
    for mode in (False, True):
        assert torch.equal(backbone.train(mode)(batch).tokens, backbone(other).tokens)
    backbone.eval()
    with torch.no_grad():
        late = batch.replace(
            images=torch.cat([batch["images"][:, :3], 255 - batch["images"][:, 3:]], 1)
        )
        change = (backbone(late).tokens - backbone(batch).tokens).abs().amax(2)
        assert not change[:, :3].any() and change[1, 3:].min() > 1e-5
        torch.testing.assert_close(
            backbone(rows_of(batch, [1])).tokens[0], backbone(batch).tokens[1], rtol=1e-5, atol=1e-5
        )
    tokens.square().sum().backward()
    named = dict(backbone.named_parameters())
    assert all(
        p.grad is not None for n, p in named.items() if n.startswith(("vision.", "project."))
    )
    layers = backbone.layers()
    assert sorted(n for names in layers.values() for n in names) == sorted(named)
    seen = [layer for layer in layers if layer.startswith("vision.")]
    assert list(layers)[: len(seen) + 2] == [*seen, "encoders", "block00"] and len(seen) >= 3


@torch.no_grad()
def test_a_frame_is_what_the_vision_backbone_says_of_it():
    backbone = built("mlp", FRAMES, vision="timm/test_resnet")
    batch = with_frames(batch_of([2, 4]))
    caught = {}
    hook = backbone.vision.register_forward_pre_hook(
        lambda module, args: caught.update(x=args[0]["image"])
    )
    backbone(batch)
    hook.remove()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = torch.stack(
        [
            (batch["images"][i, t].float() / 255 - mean[:, None, None]) / std[:, None, None]
            for i, n in enumerate((2, 4))
            for t in range(n)
        ]
    )
    torch.testing.assert_close(caught["x"], want)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (
            {"channels": 3, "size": 32},
            {},
            r"policy/mlp reads trajectories \(modality trajectory\); these rows are channels, size",
        ),
        ({**INPUTS, "spaces": {}}, {}, "reads trajectories"),
        (
            FRAMES,
            {},
            "the rows have frames of 32 pixels that nothing reads: set vision: timm/resnet18",
        ),
        (INPUTS, {"vision": "timm/resnet18"}, "vision: timm/resnet18 has no frames to read"),
        (
            FRAMES,
            {"vision": "timm/resnet81"},
            "vision: timm/resnet81 is not a LIBRARY/MODEL; did you mean resnet",
        ),
        (FRAMES, {"vision": "tim/resnet18"}, "not a LIBRARY/MODEL"),
        (FRAMES, {"vision": "transformers/bert"}, "vision: transformers/bert reads text"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        built("mlp", inputs, **options)


@pytest.mark.parametrize(
    ("name", "option", "memory"),
    [
        ("mlp", "context", "window"),
        ("mlp", "heads", "window"),
        ("transformer", "window", "context"),
    ],
)
def test_an_option_of_the_other_architecture_is_refused(name, option, memory):
    """`policy/mlp: {context: 20}` would know one step. A bundle, which has them all, is read."""
    every_option = built(name).arch.options
    bundle.build_backbone(Architecture(f"policy/{name}", every_option, INPUTS), seed=0)
    for stated in ({option: 2}, {**every_option, option: 2}):
        arch = Architecture(f"policy/{name}", stated, INPUTS)
        with pytest.raises(ValueError, match=f"{name} does not read {option}: .* {memory} says"):
            bundle.build_backbone(arch, seed=0)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="policy/transformer: width 16 is not divided by heads 3"):
        built("transformer", heads=3)
    with pytest.raises(ValueError, match="cannot hide steps"):
        built("mlp")(batch_of([2]), token_mask=torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(
        ValueError, match="reads frames with timm/test_resnet, and these rows have none"
    ):
        built("mlp", FRAMES, vision="timm/test_resnet")(batch_of([2]))


# ---------------------------------------------------------------- the rest of the house


@pytest.mark.parametrize("name", KINDS)
def test_classes_and_rows_without_actions_pass(name):
    inputs = {
        "spaces": {
            "o3c4": {"observation": 3, "action": 4, "discrete": True},
            "o3a0": {"observation": 3, "action": 0, "discrete": False},
        },
        "tasks": 0,
        "images": None,
    }
    backbone = built(name, inputs)
    for actions in (True, False):
        found = backbone(batch_of([4, 3], [0, 1], actions=actions, inputs=inputs))
        assert torch.isfinite(found.tokens).all() and found.pooled.shape == (2, 16)
    assert "action_encoders.o3a0.weight" not in backbone.state_dict()


@pytest.mark.parametrize("name", KINDS)
def test_lora_and_the_other_techniques_take_it(name):
    """An adapter finds layers to adapt, and merged it gives what it gave."""
    task = task_of(
        f"policy/{name}",
        INPUTS,
        "classification",
        {"values": [0, 1], "labels": ["0", "1"]},
        width=16,
    )
    batch = batch_of([6, 6], [0, 1])
    kind = registry.get("technique", "lora")
    lora = kind(kind.options_class())
    names = list(task.state_dict())
    wrapped = lora.wrap(task)
    moving = [n for n, p in wrapped.named_parameters() if p.requires_grad and "lora" in n]
    assert moving
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora" in n:
                p.normal_(0, 0.1)
        want = wrapped.eval().backbone(batch).pooled
        done = lora.finish(wrapped)
        assert list(done.state_dict()) == names
        torch.testing.assert_close(done.eval().backbone(batch).pooled, want, rtol=1e-4, atol=1e-5)


def test_position_embeddings_of_the_vision_backbone_have_no_weight_decay():
    backbone = built("mlp", FRAMES, vision="timm/test_vit")
    assert "vision.model.pos_embed" in backbone.undecayed_parameters()
    assert built("mlp").undecayed_parameters() == set()
