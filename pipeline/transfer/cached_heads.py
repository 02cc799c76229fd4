"""Heads on a frozen backbone: its features are computed once, and the heads train together.

A stack of K heads is one module, trained by the loop of all other training. Its parameters have a
leading dimension K. Each head has its own rows, order, learning rate and clip, and its gradients
touch no other head, so the results are those of training one at a time. A head that draws random
numbers (dropout) is a stack of its own, since what it draws would depend on the other heads.

A stack makes a `TrainingRun` of its own and not an `Experiment` (`pipeline.train.experiment`). An
experiment has one set of rows, one order, one validation and one log, all read from files. A stack
has those of every head, in memory. An experiment with all of these optional would be longer than
the lines that it would save here.

Where the technique says so (`SolvesHead`), each head is the solution of a convex problem instead
(`pipeline.transfer.solved_heads`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pipeline.config import provenance, registry
from pipeline.config.schema import ComponentConfig, Train, spec_hash
from pipeline.core.contracts import Backbone, Batch, Objective, Task, Technique
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    is_calibrated,
    mixes_inputs,
)
from pipeline.core.contracts.technique_capabilities import (
    selects_features,
    solves_head,
)
from pipeline.core.metrics.catalog import Predictions
from pipeline.core.rng import mix
from pipeline.data.stream import LoadedBatch, Rows
from pipeline.io import checksums, heartbeat, storage
from pipeline.report.trial_record import TrialRecord
from pipeline.train import evaluate, experiment, loop
from pipeline.train.log import RowTrace
from pipeline.train.online_probe import features
from pipeline.train.optim import ParameterGroup
from pipeline.train.pretrain import device_name
from pipeline.train.ranks import Ranks, default_device
from pipeline.transfer import solved_heads
from pipeline.transfer import trial as trials
from pipeline.transfer.grid import Trial
from pipeline.transfer.pruning import STACKS
from pipeline.transfer.trial import Shared, TargetData, TrialSummary

FEATURES_FORMAT = 1
"""Version of the files of features: with another one they are computed again."""
FEATURES_CODE = ("pipeline.train.online_probe",)
"""Modules that features start from, with the modality and the backbone's library."""

FEATURE_BYTES = 4
MAX_FEATURE_BYTES = 4 << 30
"""Memory that features of all layers may take, with a copy of those of the training rows."""


def kept_features(
    backbone: nn.Module,
    shared: Shared,
    source: str,
    backbone_key: str,
    target: str,
    split: str,
    device: torch.device,
    technique: ComponentConfig | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the features of a split of a target, computed once for a source and kept in a file.

    Args:
        technique: The technique that has changed the backbone (`Technique.wrap`), with the options
            that the change depends on; None: the backbone is the source's own.

    Returns:
        (n, D) features, and the rows' other tensors by name.
    """
    data = shared.targets[target, backbone_key]
    rows: Rows = getattr(data, split)
    cast = loop.autocast(data.spec.train, device)
    if source not in shared.source_keys or not data.key:
        return features(backbone, rows, device, cast)
    # labels are kept with the features: the state says which number is which label
    objective = [data.objective.name, data.objective.state]
    arch = shared.backbone_groups[backbone_key].arch
    made = provenance.made_by(
        FEATURES_CODE,
        provenance.components_of(
            data.spec.data.modality.name,
            arch.name,
            arch.options,
            technique=technique.name if technique else None,
        ),
    )
    # features cost little: those of other weights, code or versions are computed again
    made_by = [shared.parent_weights.get(source), made.hash, made.versions]
    key = spec_hash(
        FEATURES_FORMAT,
        shared.source_keys.get(source),
        made_by,
        backbone_key,
        data.key,
        objective,
        split,
        len(rows),
        device.type,
        data.spec.train.precision,
        *([str(technique)] if technique else []),
    )
    uri = storage.join(shared.root, "features", f"{target}-{source}-{split}-{key}")
    content = checksums.read_checked_or_none(uri, "the features are computed again")
    if content is not None:
        tensors = {name: tensor.to(device) for name, tensor in load(content).items()}
        return tensors.pop("pooled"), tensors
    pooled, others = features(backbone, rows, device, cast)
    tensors = {**others, "pooled": pooled}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    checksums.write_checked(uri, save(tensors))
    return pooled, others


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
                nn.Parameter(torch.stack([head.get_parameter(name).detach() for head in heads]))
                for name in self.names
            ]
        )
        # non-finite steps of each head; in a buffer, so that resume points have them
        self.bad: Tensor
        self.register_buffer("bad", torch.zeros(len(heads)))
        self._views: list[list[nn.Parameter]] = []

    def layers(self) -> dict[str, list[str]]:
        return {"head": [f"stacked.{i}" for i in range(len(self.names))]}

    def _call(self, function: str, features: Tensor, data: dict[str, Tensor]):
        template = self.template[0]
        template.train(self.training)
        rows = np.zeros(features.shape[-2], dtype=np.int64)
        keys = torch.zeros(0)

        def call_head(params, x, tensors):
            return functional_call(
                _Method(template, function),
                {f"head.{n}": p for n, p in params.items()},
                (x, Batch(rows, keys, tensors)),
            )

        is_evaluation = features.dim() == 2  # every head then reads the same rows
        dims = (0, None, None) if is_evaluation else (0, 0, 0)
        # random numbers of several heads would come from one generator: torch raises an error
        randomness = "different" if self.count == 1 else "error"
        return vmap(call_head, in_dims=dims, randomness=randomness)(
            dict(zip(self.names, self.stacked, strict=True)), features, data
        )

    def forward(self, batch: Batch):
        """Return the sum of the heads' losses, and the number of losses of one head.

        The loop divides by that number, so each head gets its own mean.

        Args:
            batch: ``features`` (K, B, D), and the other tensors (K, B).
        """
        data = {name: tensor for name, tensor in batch.data.items() if name != "features"}
        total, count, _ = self._call("head_loss", batch["features"], data)
        return total.sum(), count[0], {}

    def predict(self, features: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._call("head_predict", features, data)

    def groups(self, rates: dict[str, float], train: Train) -> list[ParameterGroup]:
        """Return a group of the optimiser for each head and weight decay.

        Its parameters and gradients are views of the stacked ones.
        """
        out: list[ParameterGroup] = []
        for parameter in self.stacked:
            parameter.grad = torch.zeros_like(parameter)
        for k, settings in enumerate(self.trains):
            decayed: dict[float, list[nn.Parameter]] = {}
            for parameter in self.stacked:
                view = nn.Parameter(parameter.data[k])
                assert parameter.grad is not None
                view.grad = parameter.grad[k]
                decay = settings.weight_decay if view.dim() > 1 else 0.0
                decayed.setdefault(decay, []).append(view)
            out += [
                ParameterGroup(params=params, peak=settings.lr, weight_decay=decay, train=settings)
                for decay, params in decayed.items()
            ]
        return out

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None, to_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient of each head by its own norm.

        A head whose gradient is not finite does not change in this step, and is counted in ``bad``.
        """
        grads = [p.grad for p in self.stacked if p.grad is not None]
        by_tensor = [g.flatten(1).norm(dim=1) for g in grads]
        norms = torch.stack(by_tensor).norm(dim=0) * to_mean
        is_finite = torch.isfinite(norms)
        self.bad.add_((~is_finite).float())
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norms)
        for g in grads:
            shape = (-1, *[1] * (g.dim() - 1))
            g.copy_(torch.where(is_finite.view(shape), g * scale.view(shape), 0.0))
        return norms.nan_to_num().max(), torch.ones_like(to_mean, dtype=torch.bool)


class _Method(nn.Module):
    """A method of an objective as the forward of a module, as ``functional_call`` needs it."""

    def __init__(self, head: Objective, function: str):
        super().__init__()
        self.head, self.function = head, function

    def forward(self, *args):
        return getattr(self.head, self.function)(*args)


class _NoLogs(nn.Module):
    log_names = ()


class KeepHeads:
    """Keeps the weights of each head at its own best validation."""

    def __init__(self, primary: str, keep: str, count: int, patience: int | None = None):
        self.best = [loop.KeepBest(primary, keep, patience) for _ in range(count)]
        self.weights: list[list[Tensor] | None] = [None] * count
        self.curves: list[list[loop.Metrics]] = [[] for _ in range(count)]

    def update(self, step, metrics, task):
        for k, (best, values) in enumerate(zip(self.best, metrics["heads"], strict=True)):
            if best.is_exhausted:  # this head alone would have stopped
                continue
            self.curves[k].append({"step": step, **values})
            if best.should_keep(step, values):
                self.weights[k] = [p.detach()[k].clone() for p in task.stacked]

    @torch.no_grad()
    def restore(self, task):
        for k, weights in enumerate(self.weights):
            for parameter, kept in zip(task.stacked, weights or (), strict=False):
                parameter[k].copy_(kept)

    def start_phase(self):
        for best in self.best:
            best.start_phase()

    @property
    def is_exhausted(self) -> bool:
        return all(best.is_exhausted for best in self.best)

    def stopped_at(self, k: int, steps: int) -> int:
        """Return the step after which a head was exhausted; 0: it was not before the last step."""
        last = self.curves[k][-1]["step"]
        return last if self.best[k].is_exhausted and last < steps else 0

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


def can_stack(group: list[Trial], shared: Shared) -> bool:
    """Return whether trials of one backbone may share features and train as a stack.

    The technique must be frozen, and the head must read pooled features only.
    """
    first = group[0]
    data = shared.targets[first.target, first.backbone_key]
    objective = registry.get("objective", data.objective.name)
    options = objective.options_class(**data.objective.options)
    if not has_cached_head(objective) or mixes_inputs(options):
        return False
    return first.technique_object.frozen and data.spec.workers == 0


SplitFeatures = tuple[Tensor, dict[str, Tensor]]
"""(n, D) features of a split and its rows' other tensors, on the device."""


@dataclass(frozen=True)
class StackedTrial:
    """One trial of a stack: its settings and its labelled rows."""

    trial: Trial
    train: Train
    rows: Rows
    steps: int


@dataclass(frozen=True)
class SharedFeatures:
    """The features that the trials of one (source, backbone, target) share."""

    data: TargetData
    backbone: Backbone
    splits: dict[str, SplitFeatures]
    transfer: str
    """A description of the tensors that came from the source."""
    seconds: float
    """Each trial's share of the time that the features took."""
    device: torch.device
    built: trials.BuiltBackbone | None
    """The backbone for further heads; None where the technique has changed it."""


def run(
    group: list[Trial], shared: Shared, on_step: Callable[[], None] = heartbeat.beat
) -> list[TrialRecord]:
    """Train the heads of several trials of one (source, backbone, target) together.

    Trials whose steps or batches differ are trained in stacks of their own, and so is a head that
    draws random numbers. A head with a non-finite step is trained again alone.

    Returns:
        The same records as those of ``trial.run``.
    """
    cached = shared_features(group, shared)
    head, _ = _build_head(group[0], shared, cached)
    is_random = draws_random_numbers(head, cached.splits["train"])
    records, stacks = _stacks(group, shared, is_random)
    technique = group[0].technique_object
    penalties = technique.penalties() if solves_head(technique) else ()
    for members in stacks:
        if penalties and not is_random:
            records += [_solve(member, shared, cached, penalties, on_step) for member in members]
        else:
            records += _run_stack(members, shared, cached, on_step)
    return records


def shared_features(group: list[Trial], shared: Shared) -> SharedFeatures:
    """Compute or read the features of the splits that the trials need."""
    device = default_device()
    first, began = group[0], time.time()
    task, transfer, _ = _build_wrapped(first, shared)
    technique = _technique_of_features(first)
    names = ["train", "validation", *(["test"] if first.stage == "final" else [])]
    data = shared.targets[first.target, first.backbone_key]
    if selects_features(first.technique_object):
        _check_size(first, data, names, task.backbone.pooled_dim)
    key = (first.source, first.backbone_key, first.target)
    splits = {
        name: kept_features(task.backbone, shared, *key, name, device, technique) for name in names
    }
    if selects_features(first.technique_object):
        note = first.technique_object.describe_features(task.backbone, splits["train"][0])
        transfer = f"{transfer}; {note}"
    built = None if technique else trials.BuiltBackbone(task.backbone)
    seconds = (time.time() - began) / len(group)
    return SharedFeatures(data, task.backbone, splits, transfer, seconds, device, built)


def _technique_of_features(trial: Trial) -> ComponentConfig | None:
    """Return the technique that has changed the backbone of a trial; None: none has."""
    technique = trial.technique_object
    if type(technique).wrap is Technique.wrap:
        return None
    if selects_features(technique):  # its options are about the head
        return ComponentConfig(name=trial.technique.name)
    return trial.drawn_technique


def _check_size(trial: Trial, data: TargetData, names: list[str], width: int) -> None:
    """Raise ValueError where the features of all layers would take too much memory."""
    # a trial's own rows are copied out of the training rows
    rows = sum(len(getattr(data, name)) for name in ["train", *names])
    size = FEATURE_BYTES * rows * width
    if size > MAX_FEATURE_BYTES:
        raise ValueError(
            f"target {trial.target}: {trial.technique.name} would hold {width} features of each "
            f"row, {size / 2**30:.1f} GiB in all, and {MAX_FEATURE_BYTES / 2**30:g} GiB are "
            "allowed: use linear_probe, a smaller backbone or fewer rows, or set the target's "
            "data.decode to train (its head is then trained by steps, and no features are kept)"
        )


def _stacks(
    group: list[Trial], shared: Shared, is_random: bool
) -> tuple[list[TrialRecord], list[list[StackedTrial]]]:
    """Group trials into stacks.

    Returns:
        Records of the trials whose settings are invalid, and the members of each stack.
    """
    failed: list[TrialRecord] = []
    stacks: dict[tuple[Any, ...], list[StackedTrial]] = {}
    for trial in group:
        try:
            member = StackedTrial(trial, *trials.resolve_training(trial, shared))
        except ValueError as error:  # the settings of this trial alone
            failed.append(trials.failed_record(trial, shared, error))
            continue
        shared_settings = member.train.model_dump(exclude={"lr", "weight_decay"})
        # the heads of a stack share the class weights of the first one
        counts = trials.objective_of(trial, shared).state.get("counts")
        settings = str(sorted(shared_settings.items()))
        key = (member.steps, settings, str(counts), trial.id if is_random else "")
        stacks.setdefault(key, []).append(member)
    return failed, list(stacks.values())


def draws_random_numbers(head: Objective, rows: SplitFeatures) -> bool:
    """Return whether the head's loss draws random numbers in training (dropout).

    The losses of two equal heads are computed under `vmap` on two rows: it raises where random
    numbers are drawn.
    """
    pooled = rows[0][:2]
    tensors = {name: tensor[:2] for name, tensor in rows[1].items()}
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


def _run_stack(
    members: list[StackedTrial],
    shared: Shared,
    cached: SharedFeatures,
    on_step: Callable[[], None],
) -> list[TrialRecord]:
    """Train the heads of one stack, test each of them and write its record."""
    began, first = time.time(), members[0]
    heads, start_hashes = zip(
        *(_build_head(member.trial, shared, cached) for member in members), strict=True
    )
    stack = HeadStack(list(heads), [member.train for member in members]).to(cached.device)
    # a stack is small: no micro-batches, no compilation
    train = first.train.model_copy(update={"micro_batch": None, "compile": False})
    keeper = KeepHeads(cached.data.metrics[0], train.keep, len(members), train.patience)
    folder = storage.join(shared.root, STACKS, spec_hash([member.trial.id for member in members]))
    history = trials.history_of(folder, [member.trial for member in members], shared)
    history.drop_incompatible(shared.remake)
    batches = _StackBatches(members, shared, cached)
    validation = cached.splits["validation"]

    def evaluate_heads(task: nn.Module) -> loop.Metrics:
        predictions = _predict_all_heads(stack, validation, train)
        names = cached.data.metrics
        return {"heads": [evaluate.compute_metrics(of_head, names) for of_head in predictions]}

    outcome = loop.fit(
        loop.TrainingRun(
            task=stack,  # type: ignore[arg-type]
            technique=first.trial.technique_object,
            train=train,
            steps=first.steps,
            # a single head draws the random numbers that its trial alone would; several draw none
            seed=mix(shared.seed, first.trial.seed, 3) if len(members) == 1 else 0,
            batches=batches,
            preprocess=lambda batch, training: batch,
            keeper=keeper,
            evaluate=evaluate_heads,
            ranks=Ranks(device=cached.device),
            checkpoint_folder=experiment.checkpoint_folder(folder),
            restart_if_damaged=True,
            on_start=history.start,
            on_rows=batches.trace if train.trace_rows else None,
            on_step=on_step,
        )
    )
    tested = (
        _predict_all_heads(stack, cached.splits["test"], train) if "test" in cached.splits else None
    )
    validated = (
        _predict_all_heads(stack, validation, train) if tested and is_calibrated(heads[0]) else None
    )
    seconds = (outcome.seconds_before + time.time() - began) / len(members) + cached.seconds
    records = []
    for k, (member, head) in enumerate(zip(members, heads, strict=True)):
        if float(stack.bad[k]):
            records.append(_run_alone(member.trial, shared, on_step))
            continue
        _copy_weights(head, stack, k)
        test = tested[k] if tested else None
        if validated:
            head.calibrate(validated[k])
            test = _predict_with_head(head, cached.splits["test"], train)
        stopped_at = keeper.stopped_at(k, first.steps)
        summary = TrialSummary(
            steps=stopped_at or outcome.steps,
            stopped_at=stopped_at,
            seconds=seconds,
            device=device_name(cached.device),
            n_train=len(member.rows),
            params_trained=sum(parameter[k].numel() for parameter in stack.stacked),
            layers_trained="head",
            start_weights=start_hashes[k],
            settings=trials.calibration_of(head),
            curve=keeper.curves[k],
            kept_step=keeper.best[k].step,
            resumed_from=outcome.resumed_from,
            transfer="; ".join([cached.transfer, *history.damaged]),
            begun_by=history.others,
        )
        metrics = keeper.best[k].metrics
        records.append(_write_head(member, shared, cached, head, began, summary, metrics, test))
    storage.remove_tree(folder)
    return records


def _write_head(
    member: StackedTrial,
    shared: Shared,
    cached: SharedFeatures,
    head: Objective,
    began: float,
    summary: TrialSummary,
    validation: dict[str, float],
    test: Predictions | None,
) -> TrialRecord:
    """Write the predictions, bundle and record of a trial whose head is finished.

    Args:
        began: When it began, in seconds since 1970.
        test: Predictions of all test rows, in the order of their ids; None: they were not read.
    """
    if test is not None:
        ids = cached.data.test.selection.all_ids
        test = {"row": ids, **test}
    record = trials.make_record(
        member.trial, shared, member.train, began, summary, validation, test
    )
    is_kept = shared.keep_bundles and test is not None
    task = Task(cached.backbone, head) if is_kept else None
    return trials.write_results(member.trial, shared, record, test, task)


def _solve(
    member: StackedTrial,
    shared: Shared,
    cached: SharedFeatures,
    penalties: tuple[float, ...],
    on_step: Callable[[], None],
) -> TrialRecord:
    """Solve the head of a trial for every penalty, test the best one and write its record."""
    began, trial, train = time.time(), member.trial, member.train
    head, start_hash = _build_head(trial, shared, cached)
    validation = cached.splits["validation"]
    features, tensors = cached.splits["train"]
    index = torch.from_numpy(_indices_of_rows(cached.data, member.rows)).to(features.device)

    def validate(solved: Objective) -> dict[str, float]:
        return evaluate.compute_metrics(
            _predict_with_head(solved, validation, train), cached.data.metrics
        )

    trial_rows = features[index], {name: tensor[index] for name, tensor in tensors.items()}
    technique = trial.technique_object
    try:
        if selects_features(technique):
            selection = technique.selection()
            solutions = solved_heads.solve_selected(
                head, *trial_rows, selection, penalties, validate, on_step
            )
        else:
            solutions = solved_heads.solve(head, *trial_rows, penalties, validate, on_step)
    except FloatingPointError as error:
        return trials.failed_record(trial, shared, error)
    chosen = solved_heads.best(solutions, cached.data.metrics[0])
    head = chosen.head
    test: Predictions | None = None
    if "test" in cached.splits:
        if is_calibrated(head):
            head.calibrate(_predict_with_head(chosen.head, validation, train))
        test = _predict_with_head(chosen.head, cached.splits["test"], train)
    iterations = sum(solution.iterations for solution in solutions)
    settings = {"solver": chosen.solver, "penalty": chosen.penalty, "iterations": iterations}
    if chosen.share is not None:
        settings["share"] = chosen.share
    # the solver takes no training steps, and uses no setting of them
    settings |= dict.fromkeys(("lr", "global_batch", "weight_decay", "optimizer", "steps"))
    summary = TrialSummary(
        steps=iterations,
        seconds=time.time() - began + cached.seconds,
        device=device_name(cached.device),
        n_train=len(member.rows),
        params_trained=sum(parameter.numel() for parameter in chosen.head.parameters()),
        layers_trained="head",
        start_weights=start_hash,
        settings={**settings, **trials.calibration_of(chosen.head)},
        curve=[{"step": iterations, **chosen.metrics}],
        kept_step=iterations,
        transfer=cached.transfer,
    )
    return _write_head(member, shared, cached, chosen.head, began, summary, chosen.metrics, test)


def _indices_of_rows(data: TargetData, rows: Rows) -> np.ndarray:
    """Return the indices of a trial's rows in the features of all training rows."""
    ids = data.train.selection.all_ids
    return np.searchsorted(ids, rows.selection.all_ids)


def _build_head(trial: Trial, shared: Shared, cached: SharedFeatures) -> tuple[Objective, str]:
    """Return a trial's head and the hash of its start weights; all trials share the backbone."""
    if cached.built is None:
        task, _, start_hash = _build_wrapped(trial, shared)
    else:
        task, _, start_hash = trials.build_task(trial, shared, built=cached.built)
    return task.objective, start_hash


def _build_wrapped(trial: Trial, shared: Shared) -> tuple[Task, str, str]:
    """Build a trial's task and wrap it by its technique.

    Returns:
        The task, what was transferred, and the hash of the weights before wrapping.
    """
    task, transfer, start_hash = trials.build_task(trial, shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(shared.seed, trial.seed, 4))  # as where it is trained by steps
        return trial.technique_object.wrap(task), transfer, start_hash


class _StackBatches:
    """Batches of a stack: at every step the features of each head's own rows."""

    def __init__(self, members: list[StackedTrial], shared: Shared, cached: SharedFeatures):
        self.members, self.shared = members, shared
        self.features, self.tensors = cached.splits["train"]
        selection = cached.data.train.selection
        self.ids = selection.all_ids
        self.plans = [
            trials.order_of(member.trial, shared, member.train, member.rows) for member in members
        ]
        self.indices = [_indices_of_rows(cached.data, member.rows) for member in members]
        self.traces: list[RowTrace] = []

    def _rows(self, step: int) -> list[np.ndarray]:
        """Return the indices in the features of each head's rows at a step."""
        pairs = zip(self.plans, self.indices, strict=True)
        return [indices[plan.batch(step)[0]] for plan, indices in pairs]

    def __call__(self, span: range) -> Iterator[LoadedBatch]:
        for step in span:
            index = torch.from_numpy(np.stack(self._rows(step))).to(self.features.device)
            data = {name: tensor[index] for name, tensor in self.tensors.items()}
            rows = index[0].cpu().numpy()
            batch = Batch(rows, torch.zeros(0), {"features": self.features[index], **data})
            yield LoadedBatch(batch, [], 0.0)

    def trace(self, step: int, rows: np.ndarray) -> None:
        """Write the ids of each head's rows into its trial's folder."""
        if not self.traces:
            folders = [trials.folder_uri(self.shared, member.trial) for member in self.members]
            self.traces = [RowTrace(folder, 0) for folder in folders]
        for trace, indices in zip(self.traces, self._rows(step), strict=True):
            trace(step, self.ids[indices])


def _run_alone(trial: Trial, shared: Shared, on_step: Callable[[], None]) -> TrialRecord:
    """Train a head again, without the others."""
    try:
        return trials.run(trial, shared, on_step=on_step)
    except Exception as error:  # it is this head's alone: the others are done
        return trials.failed_record(trial, shared, error)


@torch.no_grad()
def _predict_all_heads(stack: HeadStack, rows: SplitFeatures, train: Train) -> list[Predictions]:
    """Predict the same rows with every head, in the precision in which it would train alone."""
    stack.eval()
    with loop.autocast(train, rows[0].device):
        arrays = {name: tensor.cpu().numpy() for name, tensor in stack.predict(*rows).items()}
    return [{name: array[k] for name, array in arrays.items()} for k in range(stack.count)]


@torch.no_grad()
def _predict_with_head(head: Objective, rows: SplitFeatures, train: Train) -> Predictions:
    """Predict rows with one head, with the calibration that was fitted for it."""
    head = head.to(rows[0].device).eval()
    assert has_cached_head(head)
    features, tensors = rows
    ids = np.zeros(len(features), dtype=np.int64)
    with loop.autocast(train, features.device):
        predictions = head.head_predict(features, Batch(ids, torch.zeros(0), tensors))
    return {name: tensor.cpu().numpy() for name, tensor in predictions.items()}


@torch.no_grad()
def _copy_weights(head: Objective, stack: HeadStack, k: int) -> None:
    """Copy the weights of a head of the stack into a head of its own."""
    parameters = dict(head.named_parameters())
    for name, parameter in zip(stack.names, stack.stacked, strict=True):
        parameters[name].copy_(parameter[k].cpu())
