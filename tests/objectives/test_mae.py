"""MAE: the loss is that of the hidden patches alone, and the encoder never sees them."""

import numpy as np
import pytest
import torch
from toys import image_rows, make_run, task_of

from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import CouplesRows
from pipeline.objectives.mae import MAE
from pipeline.train import loop

SMALL = {"width": 16, "heads": 2, "depth": 1}
INPUTS = {"channels": 3, "size": 64}


def mae(name: str = "timm/test_vit", inputs=None, **options):
    return task_of(name, inputs or INPUTS, "mae", options={**SMALL, **options})


def batch_of(n: int = 3, size: int = 64, seed: int = 0) -> Batch:
    image = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Batch(np.arange(n), torch.arange(n) * 7919, {"image": image})


def patches(image: torch.Tensor, side: int) -> list[torch.Tensor]:
    """Patches of (C, H, W), row by row, as (side, side, C)."""
    return [
        image[:, y : y + side, x : x + side].permute(1, 2, 0)
        for y in range(0, image.shape[1], side)
        for x in range(0, image.shape[2], side)
    ]


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_the_mean_squared_error_of_the_hidden_patches(norm_pixels):
    made, batch = mae(norm_pixels=norm_pixels), batch_of()
    made.eval()
    objective = made.objective
    mask = objective.masks(batch.keys)
    tokens = made.backbone(batch, token_mask=mask, want=("tokens",)).tokens
    found = objective.decoded(tokens, mask)
    total = 0.0
    for row, image in enumerate(batch["image"]):
        hidden = [
            patch
            for patch, gone in zip(patches(image, 16), mask[row].tolist(), strict=True)
            if gone
        ]
        for mine, patch in zip(found[row], hidden, strict=True):
            want = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt() if norm_pixels else patch
            total += float(((mine - want.flatten()) ** 2).mean())
    loss, count, _ = made(batch)
    assert float(loss) == pytest.approx(total, rel=1e-4) and count == 3 * 12
    each = objective.predict(made.backbone, batch)
    assert (
        float(each["loss"].sum()) == pytest.approx(total, rel=1e-4)
        and each["count"].tolist() == [12.0] * 3
    )


def test_the_decoder_puts_every_token_in_its_place():
    """Visible patches their own tokens, hidden ones the mask token, each with its position; the
    class token in front has none.
    """
    made, batch = mae(), batch_of()
    objective, seen = made.objective, []
    objective.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mask = objective.masks(batch.keys)
    tokens = made.backbone(batch, token_mask=mask, want=("tokens",)).tokens
    objective.decoded(tokens, mask)
    for row, found in enumerate(seen[0]):
        own = objective.enter(tokens[row])
        visible = iter(own[1:])
        want = [objective.mask_token if gone else next(visible) for gone in mask[row].tolist()]
        assert torch.allclose(
            found, torch.cat([own[:1], torch.stack(want) + objective.positions]), atol=1e-6
        )
    assert len(objective.positions.unique(dim=0)) == 16


@pytest.mark.parametrize(
    "name", ["timm/test_vit", "timm/test_vit2", "timm/deit_tiny_distilled_patch16_224"]
)
def test_visible_patches_alone_go_through_the_blocks(name):
    """As the model's own blocks on the kept tokens, with the positions that these have in the whole
    image.
    """
    made, batch = mae(name), batch_of()
    backbone = made.backbone.eval()
    mask = made.objective.masks(batch.keys)
    found = backbone(batch, token_mask=mask, want=("tokens",)).tokens
    model, lengths = backbone.model, []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    with torch.no_grad():
        whole = model._pos_embed(model.patch_embed(batch["image"]))
        prefix = model.num_prefix_tokens
        for row in range(3):
            kept = torch.cat([whole[row, :prefix], whole[row, prefix:][~mask[row]]])[None]
            assert torch.allclose(
                found[row], model.norm(model.blocks(model.norm_pre(kept)))[0], atol=1e-5
            )
        backbone(batch, token_mask=mask, want=("tokens",))
    handle.remove()
    assert set(lengths) == {prefix + 4}
    nothing = torch.zeros_like(mask)
    assert torch.allclose(
        backbone(batch, token_mask=nothing).tokens, backbone(batch).tokens, atol=1e-5
    )


def test_what_is_hidden_cannot_be_seen():
    made, batch = mae(), batch_of()
    made.eval()
    mask = made.objective.masks(batch.keys)
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = batch.replace(image=torch.where(pixels, 99.0, batch["image"]))
    assert torch.equal(
        made.backbone(batch, token_mask=mask).pooled, made.backbone(other, token_mask=mask).pooled
    )


def test_masks_follow_the_rows_keys():
    objective = mae().objective
    keys = torch.randint(-(2**62), 2**62, (400,), generator=torch.Generator().manual_seed(1))
    masks = objective.masks(keys)
    assert (masks.sum(1) == 12).all() and torch.equal(masks[50:60], objective.masks(keys[50:60]))
    assert (masks.float().mean(0) - 0.75).abs().max() < 0.1, "every patch as often as every other"
    assert len(masks.unique(dim=0)) > 300


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        (
            "timm/test_resnet",
            INPUTS,
            {},
            r"timm/test_resnet: mae hides patches, which takes a plain vision transformer",
        ),
        ("timm/test_vit", {"channels": 3, "size": 16}, {}, r"two or more a side"),
        (
            "timm/test_vit",
            INPUTS,
            {"width": 20, "heads": 3},
            r"mae.width 20 must be a multiple of 4 and of mae.heads 3",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(name, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        mae(name, inputs, **options)


def test_a_backbone_that_cannot_leave_patches_out_says_so():
    backbone = task_of("timm/test_resnet", INPUTS, "simclr").backbone
    with pytest.raises(ValueError, match="cannot leave patches out"):
        backbone(batch_of(), token_mask=torch.zeros(3, 16, dtype=torch.bool))


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit3"])
def test_every_parameter_has_a_gradient(name):
    """DDP waits for each: also for a pooling with weights that the loss does not read."""
    size = 160 if name.endswith("3") else 64
    made = mae(name, {"channels": 3, "size": size})
    made(batch_of(size=size))[0].backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []


def test_mae_learns_without_labels():
    assert MAE.roles == () and not isinstance(MAE, CouplesRows)
    rows = image_rows(32, size=32, channels=3, noise=0.2)
    run = make_run(
        rows,
        mae(inputs={"channels": 3, "size": 32}),
        steps=40,
        lr=3e-3,
        micro_batch=4,
        log_every_steps=10,
    )
    losses: list[float] = []
    run.on_log = lambda record: losses.append(record["loss"])
    loop.fit(run)
    assert losses[-1] < 0.95 * losses[0]
