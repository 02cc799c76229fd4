"""Frozen backbones: features computed once, and all their heads trained together as one batched
problem, by the one loop.

A stack of K heads is one module whose parameters have a leading K; each head has its own rows,
order, learning rate and clip, and its gradients touch no other head, so the results are those of
training one at a time. A head that draws random numbers (dropout) is a stack of its own, since what
it draws would depend on the heads beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pipeline.config import provenance
from pipeline.config.schema import Train, spec_hash
from pipeline.core.contracts import Backbone, Batch, Objective, Task
from pipeline.core.rng import mix
from pipeline.data.stream import LoadedBatch, Rows
from pipeline.io import checksums, heartbeat, storage
from pipeline.metrics.catalog import Predictions
from pipeline.train import evaluate, loop, saved_inputs
from pipeline.train.log import RowTrace
from pipeline.train.loop import Ranks
from pipeline.train.online_probe import features
from pipeline.train.pretrain import device_name
from pipeline.transfer import trial as trials
from pipeline.transfer.grid import Trial, made_by
from pipeline.transfer.pruning import STACKS
from pipeline.transfer.trial import Record, Shared, TargetData

FEATURES_FORMAT = 1
FEATURES_CODE = ("pipeline.train.online_probe",)
"""Modules that features start from, beside the modality and the backbone's library."""


def kept_features(
    backbone: nn.Module,
    shared: Shared,
    source: str,
    base: str,
    target: str,
    split: str,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``features`` of a split of a target, computed once for a source and kept in the job's folder
    for whoever needs them next.
    """
    data = shared.targets[target, base]
    rows: Rows = getattr(data, split)
    cast = loop.autocast(data.spec.train, device)
    if source not in shared.source_keys or not data.key:
        return features(backbone, rows, device, cast)
    labelled = [
        data.objective["name"],
        data.objective["state"],
    ]  # the rows' labels are kept too: which column is which label
    arch = shared.bases[base].arch
    made = provenance.made_by(
        FEATURES_CODE,
        provenance.components_of(data.spec.data.modality.name, arch["name"], arch["options"]),
    )
    by = [
        shared.parent_weights.get(source),
        made.hash,
        made.versions,
    ]  # they cost little: those of other weights, code or versions are not used again
    key = spec_hash(
        FEATURES_FORMAT,
        shared.source_keys.get(source),
        by,
        base,
        data.key,
        labelled,
        split,
        len(rows),
        device.type,
        data.spec.train.precision,
    )
    uri = storage.join(shared.root, "features", f"{target}-{source}-{split}-{key}")
    if (content := checksums.kept_bytes(uri, "the features are computed again")) is not None:
        found = load(content)
        return found.pop("pooled").to(device), {
            name: tensor.to(device) for name, tensor in found.items()
        }
    pooled, rest = features(backbone, rows, device, cast)
    checksums.keep_bytes(
        uri,
        save(
            {name: tensor.cpu().contiguous() for name, tensor in {**rest, "pooled": pooled}.items()}
        ),
    )
    return pooled, rest


class HeadStack(nn.Module):
    """K heads of one kind as one task for the loop."""

    def __init__(self, heads: list[Objective], trains: list[Train]):
        super().__init__()
        self.backbone = None
        self.template = [heads[0]]  # in a list: its own parameters are not this module's
        self.objective = _NoLogs()
        self.trains, self.count = trains, len(heads)
        self.names = [name for name, _ in heads[0].named_parameters()]
        self.stacked = nn.ParameterList(
            [
                nn.Parameter(
                    torch.stack([dict(h.named_parameters())[name].detach() for h in heads])
                )
                for name in self.names
            ]
        )
        self.bad: Tensor
        self.register_buffer(
            "bad", torch.zeros(len(heads))
        )  # non-finite steps of each head; a resume point keeps them
        self._views: list[list[nn.Parameter]] = []

    def layers(self) -> dict[str, list[str]]:
        return {"head": [f"stacked.{i}" for i in range(len(self.names))]}

    def _call(self, function: str, features: Tensor, data: dict[str, Tensor]):
        template = self.template[0]
        template.train(self.training)
        rows = np.zeros(features.shape[-2], dtype=np.int64)
        keys = torch.zeros(0)

        def one(params, x, tensors):
            return functional_call(
                _Method(template, function),
                {f"head.{n}": p for n, p in params.items()},
                (x, Batch(rows, keys, tensors)),
            )

        shared = features.dim() == 2  # evaluation: every head reads the same rows
        dims = (0, None, None) if shared else (0, 0, 0)
        # several heads that draw random numbers would draw them from one generator: torch refuses
        # that here
        randomness = "different" if self.count == 1 else "error"
        return vmap(one, in_dims=dims, randomness=randomness)(
            dict(zip(self.names, self.stacked, strict=True)), features, data
        )

    def forward(self, batch: Batch):
        """``features`` (K, B, D) with tensors (K, B): sum over heads; the count is one head's, so
        each gets its own mean.
        """
        data = {name: tensor for name, tensor in batch.data.items() if name != "features"}
        total, count, _ = self._call("head_loss", batch["features"], data)
        return total.sum(), count[0], {}

    def predict(self, features: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._call("head_predict", features, data)

    def groups(self, rates: dict[str, float], train: Train) -> list[dict[str, Any]]:
        """One optimiser group a head and decay, over views of the stacked parameters and
        gradients.
        """
        out = []
        for parameter in self.stacked:
            parameter.grad = torch.zeros_like(parameter)
        for k, own in enumerate(self.trains):
            decayed: dict[float, list[nn.Parameter]] = {}
            for parameter in self.stacked:
                view = nn.Parameter(parameter.data[k])
                assert parameter.grad is not None
                view.grad = parameter.grad[k]
                decayed.setdefault(own.weight_decay if view.dim() > 1 else 0.0, []).append(view)
            out += [
                {"params": params, "peak": own.lr, "weight_decay": decay}
                for decay, params in decayed.items()
            ]
        return out

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None, to_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Clip each head by its own norm; a head whose gradient is not finite stands still and is
        remembered.
        """
        grads = [p.grad for p in self.stacked if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0) * to_mean
        fine = torch.isfinite(norms)
        self.bad.add_((~fine).float())
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norms)
        for g in grads:
            shape = (-1, *[1] * (g.dim() - 1))
            g.copy_(torch.where(fine.view(shape), g * scale.view(shape), 0.0))
        return norms.nan_to_num().max(), torch.ones_like(to_mean, dtype=torch.bool)


class _Method(nn.Module):
    """An objective's method as a module's forward, which is what functional_call wants."""

    def __init__(self, head: Objective, function: str):
        super().__init__()
        self.head, self.function = head, function

    def forward(self, *args):
        return getattr(self.head, self.function)(*args)


class _NoLogs(nn.Module):
    log_names = ()

    def after_step(self, backbone: Any, step: int, steps: int) -> None:
        pass


class KeepHeads:
    """Each head's weights at its own best validation."""

    def __init__(self, primary: str, keep: str, count: int):
        self.best = [loop.KeepBest(primary, keep) for _ in range(count)]
        self.weights: list[list[Tensor] | None] = [None] * count
        self.curves: list[list[dict[str, Any]]] = [[] for _ in range(count)]

    def update(self, step, metrics, task):
        for k, (best, values) in enumerate(zip(self.best, metrics["heads"], strict=True)):
            self.curves[k].append({"step": step, **values})
            before = best.step
            best.update(step, values, _Nothing)
            if best.step != before:
                self.weights[k] = [p.detach()[k].clone() for p in task.stacked]

    @torch.no_grad()
    def restore(self, task):
        for k, weights in enumerate(self.weights):
            for parameter, kept in zip(task.stacked, weights or (), strict=False):
                parameter[k].copy_(kept)

    def state_dict(self):
        return {
            "best": [best.state_dict() for best in self.best],
            "weights": self.weights,
            "curves": self.curves,
        }

    def load_state_dict(self, state):
        for best, saved in zip(self.best, state["best"], strict=True):
            best.load_state_dict(saved)
        self.weights, self.curves = state["weights"], state["curves"]


class _Nothing:
    """KeepBest wants a task to copy; the stack keeps its own rows instead."""

    @staticmethod
    def state_dict() -> dict[str, Tensor]:
        return {}


def batchable(group: list[Trial], shared: Shared) -> bool:
    """Whether trials of one backbone may share features: a frozen technique without phases of its
    own, and a head that reads pooled features only.
    """
    first = group[0]
    data = shared.targets[first.target, first.base]
    objective = trials.build(first, shared)[0].objective
    pooled = (
        type(objective).head_loss is not Objective.head_loss and not objective.mixes_inputs
    )  # mixed images have no cached features
    return first.technique_object.frozen and data.spec.workers == 0 and pooled


def run(
    group: list[Trial], shared: Shared, alive: Callable[[], None] = heartbeat.beat
) -> list[Record]:
    """Train the heads of several trials of one (source, backbone, target) together; same records as
    ``trial.run``.

    Trials whose steps or batches differ are trained in stacks of their own, and so is a head that
    draws random numbers. A head that met a non-finite step is trained again alone. ``alive`` is
    called at every step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = group[0]
    data = shared.targets[first.target, first.base]
    began = time.time()
    task, moved, _ = trials.build(first, shared)
    splits = ("train", "validation", *(["test"] if first.stage == "final" else []))
    cached = {
        name: kept_features(
            task.backbone, shared, first.source, first.base, first.target, name, device
        )
        for name in splits
    }
    shared_seconds = (time.time() - began) / len(group)
    noisy = draws_random_numbers(task.objective, cached["train"])
    stacks: dict[tuple, list[tuple[Trial, Train, Rows, int]]] = {}
    failed: list[Record] = []
    for trial in group:
        try:
            train, rows, steps = trials.resolve_training(trial, shared)
        except ValueError as error:  # this trial's settings are no settings; the others are fine
            failed.append(
                trials.failed_record(trial, shared, f"{type(error).__name__}: {error}"[:2000])
            )
            continue
        like = train.model_dump(exclude={"lr", "weight_decay"})
        alone = trial.id if noisy else ""
        stacks.setdefault((steps, str(sorted(like.items())), alone), []).append(
            (trial, train, rows, steps)
        )
    out: list[Record] = failed
    for members in stacks.values():
        out += _stack(
            members, shared, data, task.backbone, cached, moved, shared_seconds, device, alive
        )
    return out


def draws_random_numbers(head: Objective, rows: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Whether the head's loss draws random numbers in training (dropout): torch tells, on two of
    the ``rows``.
    """
    pooled, tensors = rows[0][:2], {name: tensor[:2] for name, tensor in rows[1].items()}
    twins = HeadStack([head, head], []).to(pooled.device).train()
    both = Batch(
        np.zeros(2, dtype=np.int64),
        torch.zeros(0),
        {name: torch.stack([t, t]) for name, t in {**tensors, "features": pooled}.items()},
    )
    try:
        twins(both)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        return True
    return False


def _stack(
    members: list[tuple[Trial, Train, Rows, int]],
    shared: Shared,
    data: TargetData,
    backbone: Backbone,
    cached: dict[str, Any],
    moved: str,
    shared_seconds: float,
    device: torch.device,
    alive: Callable[[], None],
) -> list[Record]:
    began = time.time()
    built: list[tuple[Objective, str]] = []
    for trial, *_ in members:  # the backbone is the same for all: only the heads are kept
        task, _, start_hash = trials.build(trial, shared)
        built.append((task.objective, start_hash))
    steps, train = (
        members[0][3],
        members[0][1].model_copy(update={"micro_batch": None, "compile": False}),
    )  # a stack of heads is small, and one batch
    stack = HeadStack([head for head, _ in built], [t for _, t, _, _ in members]).to(device)
    keeper = KeepHeads(data.metrics[0], train.keep, len(members))
    pooled, tensors = cached["train"]
    whole = data.train.selection.ids(np.arange(len(data.train)))
    plans = [trials.order_of(trial, shared, t, rows) for trial, t, rows, _ in members]
    places = [
        np.searchsorted(whole, rows.selection.ids(np.arange(len(rows))))
        for _, _, rows, _ in members
    ]
    traces = (
        [RowTrace(trials.folder(shared, trial), 0) for trial, *_ in members]
        if train.trace_rows
        else []
    )

    def batches(span: range) -> Iterator[LoadedBatch]:
        for step in span:
            index = torch.from_numpy(
                np.stack(
                    [place[plan.batch(step)[0]] for plan, place in zip(plans, places, strict=True)]
                )
            ).to(device)
            yield LoadedBatch(
                Batch(
                    index[0].cpu().numpy(),
                    torch.zeros(0),
                    {"features": pooled[index], **{n: t[index] for n, t in tensors.items()}},
                ),
                [],
                0.0,
            )

    def check(task: nn.Module) -> dict[str, Any]:
        return {
            "heads": [
                evaluate.values(found, data.metrics)
                for found in _predicted(stack, cached["validation"], train)
            ]
        }

    def on_rows(step: int, rows: np.ndarray) -> None:
        for trace, plan, place in zip(traces, plans, places, strict=True):
            trace(step, whole[place[plan.batch(step)[0]]])

    # one head alone is seeded as a trial alone, so that it draws the same random numbers; several
    # draw none
    seed = mix(shared.seed, members[0][0].seed, 3) if len(members) == 1 else 0
    notes: list[str] = []
    first, ids = members[0][0], [trial.id for trial, *_ in members]
    folder = storage.join(shared.root, STACKS, spec_hash(ids))
    made = made_by(data.spec, shared.bases[first.base], first.technique)
    parent_weights = shared.parent_weights.get(first.source)
    began_with: list[dict[str, Any]] = []

    def on_start(step: int, passed_over: list[str]) -> None:
        notes.extend(passed_over)
        began_with.extend(saved_inputs.record_start(folder, made, parent_weights, step, ids))

    work = loop.TrainingRun(
        task=stack,
        technique=members[0][0].technique_object,
        train=train,
        steps=steps,
        seed=seed,
        batches=batches,  # type: ignore[arg-type]
        ready=lambda batch, training: batch,
        keeper=keeper,
        evaluate=check,
        ranks=Ranks(device=device),
        checkpoints=storage.join(folder, saved_inputs.CHECKPOINTS),
        restarts=True,
        on_start=on_start,
        on_rows=on_rows if traces else None,
        alive=alive,
    )
    saved_inputs.drop_incompatible(folder, made, parent_weights, shared.remake)
    outcome = loop.fit(work)
    moved += "".join(f"; {note}" for note in notes)
    tests: list[Predictions] | list[None] = (
        _predicted(stack, cached["test"], train) if "test" in cached else [None] * len(members)
    )
    held = (
        _predicted(stack, cached["validation"], train)
        if "test" in cached and built[0][0].needs_calibration
        else []
    )
    seconds = (outcome.seconds_before + time.time() - began) / len(members) + shared_seconds
    out = []
    for k, (trial, own, rows, _) in enumerate(members):
        if float(stack.bad[k]):
            try:
                out.append(trials.run(trial, shared, alive=alive))
            except Exception as error:  # it is this head's alone: the others are done
                out.append(
                    trials.failed_record(trial, shared, f"{type(error).__name__}: {error}"[:2000])
                )
            continue
        head, start_hash = built[k]
        _put(head, stack, k)
        found = tests[k]
        if held:
            head.calibrate(held[k])
            found = _alone(head, cached["test"], train)
        test = (
            None
            if found is None
            else {"row": data.test.selection.ids(np.arange(len(data.test))), **found}
        )
        metadata = {
            "params_trained": sum(p[k].numel() for p in stack.stacked),
            "steps": outcome.steps,
            "seconds": seconds,
            "device": device_name(device),
            "start_weights": start_hash,
            "transfer": moved,
            "n_train": len(rows),
            "curve": keeper.curves[k],
            "kept_step": keeper.best[k].step,
            "resumed_from": outcome.resumed_from,
            "begun_by": began_with,
            "fitted": trials.calibration_of(head),
        }
        record = trials.make_record(
            trial, shared, own, began, metadata, keeper.best[k].metrics, test
        )
        trials.write(
            trial,
            shared,
            record,
            test,
            Task(backbone, head) if shared.keep_bundles and trial.stage == "final" else None,
        )
        out.append(record)
    storage.remove_tree(folder)
    return out


@torch.no_grad()
def _predicted(
    stack: HeadStack, rows: tuple[Tensor, dict[str, Tensor]], train: Train
) -> list[Predictions]:
    """Predictions of every head on the same rows, with the precision that one alone would have."""
    stack.eval()
    with loop.autocast(train, rows[0].device):
        found = {name: tensor.cpu().numpy() for name, tensor in stack.predict(*rows).items()}
    return [{name: array[k] for name, array in found.items()} for k in range(stack.count)]


@torch.no_grad()
def _alone(head: Objective, rows: tuple[Tensor, dict[str, Tensor]], train: Train) -> Predictions:
    """Predictions of one head, with what it alone has fitted on the validation rows."""
    head = head.to(rows[0].device).eval()
    with loop.autocast(train, rows[0].device):
        found = head.head_predict(
            rows[0], Batch(np.zeros(len(rows[0]), dtype=np.int64), torch.zeros(0), rows[1])
        )
    assert found is not None
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


@torch.no_grad()
def _put(head: Objective, stack: HeadStack, k: int) -> None:
    own = dict(head.named_parameters())
    for name, parameter in zip(stack.names, stack.stacked, strict=True):
        own[name].copy_(parameter[k].cpu())
