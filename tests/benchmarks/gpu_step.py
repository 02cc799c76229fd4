"""Step time on a GPU: the loop on GPT-2 124M, BERT-base and ResNet-50 against bare compiled loops, with
what an H100 reached in a bare loop beside.

    PYTHONPATH=. PYTHONUNBUFFERED=1 python3 tests/benchmarks/gpu_step.py --json gpu_step.json     # under 8 minutes on one H100; --quick: 20 s, on a CPU too

Needs torch, transformers, timm, torchmetrics, pyarrow and pydantic; no Ray and no data. Random
inputs lie in GPU memory; bf16 autocast, torch.compile, fused AdamW, clip 1.0, cosine. All sides of
a case are measured in turns within one run of the loop: whenever its stream is asked for the batch
after a turn, the other sides take their turn before it is given.

``loop``: train/loop.fit on the library's backbone and objective (packed documents: attention stays
within a document; masked LM: only the predicted positions pass the vocabulary). ``bare``: the same
module and weights in a loop of forward, backward, clip, step, schedule. ``plain``: transformers' or
timm's own model (no document mask, full head) in the same bare loop. Target: loop within 3 % of
bare. One case: --case gpt2 | bert512 | bert128 | resnet50. A case that does not fit in memory is
tried with half the batch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timing

from pipeline.core.specs import Architecture, ObjectiveSpec

WARM_STEPS, TURN_STEPS = 4, 8
CASE_SECONDS = 100
"""A case is not begun when less of --minutes is left."""


@dataclass
class Case:
    """A task of the library with its batches on the device, and the plain model's loss on the same
    number of rows.
    """

    task: Any
    batches: list[Any]
    plain: Any
    plain_loss: Callable[[Any, Any], Any]
    plain_inputs: list[dict[str, Any]]
    units: int
    """Tokens or images a step."""
    unit: str
    metric: str
    beside: str
    train: dict[str, Any] = field(default_factory=dict)


def gpt2(device: Any, batch: int, quick: bool) -> Case:
    """124M: 12 layers, 768 wide, 1024 positions, vocabulary padded to 50304; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.checkpoints import bundle

    length, vocabulary, sizes = (
        (32, 512, {"layers": 1, "hidden": 32, "heads": 2})
        if quick
        else (1024, 50304, {"layers": 12, "hidden": 768, "heads": 12})
    )
    arch = Architecture("transformers/gpt2", {**sizes, "dropout": 0.0}, _inputs(vocabulary, length))
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=sizes["hidden"],
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    batches = _texts(device, batch, length, vocabulary)
    inputs = [{"input_ids": b["tokens"], "labels": b["tokens"]} for b in batches]
    task = bundle.build_task(arch, ObjectiveSpec("clm", {}, {}), seed=0)
    plain = GPT2LMHeadModel(config)
    plain.loss_type = "ForCausalLM"  # else it warns about its name, which breaks the compiled graph
    return Case(
        task,
        batches,
        plain,
        lambda model, given: model(**given).loss,
        inputs,
        batch * length,
        "tokens/s",
        "perplexity",
        "HF Trainer 381k, compiled plain loop 398k, llm.c about 463k, bare step 526k (no "
        "document mask)",
    )


def bert(length: int, beside: str) -> Callable[[Any, int, bool], Case]:
    def make(device: Any, batch: int, quick: bool) -> Case:
        """Base: 12 layers, 768 wide, vocabulary padded to 30528; dropout 0.1."""
        import torch
        from transformers import BertConfig, BertForMaskedLM

        from pipeline.checkpoints import bundle

        n, vocabulary, sizes = (
            (32, 512, {"layers": 1, "hidden": 32, "heads": 2})
            if quick
            else (length, 30528, {"layers": 12, "hidden": 768, "heads": 12})
        )
        arch = Architecture("transformers/bert", {**sizes, "dropout": 0.1}, _inputs(vocabulary, n))
        config = BertConfig(
            vocab_size=vocabulary,
            max_position_embeddings=n,
            hidden_size=sizes["hidden"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=4 * sizes["hidden"],
        )
        batches = _texts(device, batch, n, vocabulary)
        labels = [
            torch.where(torch.rand(b["tokens"].shape, device=device) < 0.15, b["tokens"], -100)
            for b in batches
        ]
        inputs = [
            {"input_ids": b["tokens"], "labels": wanted}
            for b, wanted in zip(batches, labels, strict=True)
        ]
        task = bundle.build_task(arch, ObjectiveSpec("mlm", {}, {}), seed=0)
        return Case(
            task,
            batches,
            BertForMaskedLM(config),
            lambda model, given: model(**given).loss,
            inputs,
            batch * n,
            "tokens/s",
            "perplexity",
            beside,
        )

    return make


def resnet50(device: Any, batch: int, quick: bool) -> Case:
    """224 px, 1000 classes, channels last."""
    import numpy as np
    import timm
    import torch
    from torch.nn import functional as F

    from pipeline.checkpoints import bundle
    from pipeline.core.contracts import Batch

    size, classes, name = (32, 10, "resnet10t") if quick else (224, 1000, "resnet50")
    arch = Architecture(f"timm/{name}", {}, {"channels": 3, "size": size})
    state = {"values": list(range(classes)), "labels": [str(i) for i in range(classes)]}
    task = bundle.build_task(arch, ObjectiveSpec("classification", {}, state), seed=0)
    batches = []
    for _ in range(2):
        image = torch.randn(batch, 3, size, size, device=device).to(
            memory_format=torch.channels_last
        )
        batches.append(
            Batch(
                np.arange(batch),
                torch.arange(batch, device=device),
                {"image": image, "label": torch.randint(classes, (batch,), device=device)},
            )
        )
    plain = timm.create_model(name, num_classes=classes).to(memory_format=torch.channels_last)
    return Case(
        task,
        batches,
        plain,
        lambda model, given: F.cross_entropy(model(given["image"]), given["label"]),
        [b.data for b in batches],
        batch,
        "images/s",
        "accuracy",
        "timm 5976",
        {"channels_last": True},
    )


CASES: dict[str, tuple[Callable[[Any, int, bool], Case], int]] = {
    "gpt2": (gpt2, 64),
    "bert512": (
        bert(512, "HF Trainer 380k; masked-only head, packed 605k to 620k; full head, padded 533k"),
        64,
    ),
    "resnet50": (resnet50, 512),
    "bert128": (bert(128, "HF Trainer 416k"), 256),
}


def _inputs(vocabulary: int, length: int) -> dict[str, Any]:
    return {"vocabulary": vocabulary, "length": length, "specials": [0, 1, 2, 3, 4]}


def _texts(device: Any, batch: int, length: int, vocabulary: int) -> list[Any]:
    """Rows of two packed documents each."""
    import numpy as np
    import torch

    from pipeline.core.contracts import Batch

    out = []
    for _ in range(4):
        tokens = torch.randint(5, vocabulary - 8, (batch, length), device=device)
        cut = torch.randint(1, length, (batch, 1), device=device)
        segments = (1 + (torch.arange(length, device=device)[None] >= cut)).to(torch.int32)
        out.append(
            Batch(
                np.arange(batch),
                torch.randint(1 << 62, (batch,), device=device),
                {"tokens": tokens, "segments": segments},
            )
        )
    return out


def bare_loop(
    model: Any, loss: Callable[[Any, Any], Any], inputs: list[Any], device: Any, total: int
) -> Callable[[int], None]:
    """A function that takes so many steps: bf16, compiled, fused AdamW, clip 1.0, cosine."""
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.dim() > 1) == wide], "weight_decay": 0.05 * wide}
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    )
    taken = 0

    def steps(count: int) -> None:
        nonlocal taken
        for _ in range(count):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(compiled, inputs[taken % len(inputs)])
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            taken += 1

    compiled = torch.compile(model, dynamic=False) if COMPILE else model
    return steps


COMPILE = True


def measure(case: Case, device: Any, turns: int) -> dict[str, list[float]]:
    """Seconds a step of every side, turn by turn."""
    import torch

    from pipeline.config.schema import Train
    from pipeline.data.stream import LoadedBatch
    from pipeline.techniques.full import Full
    from pipeline.train import loop
    from pipeline.train.ranks import Ranks

    total = WARM_STEPS + turns * TURN_STEPS + 1
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    case.task.to(device), case.plain.to(device)

    def mean_loss(task: Any, batch: Any) -> Any:
        loss, count, _ = task(batch)
        return loss / count

    others = {
        "bare": bare_loop(case.task, mean_loss, case.batches, device, total),
        "plain": bare_loop(case.plain, case.plain_loss, case.plain_inputs, device, total),
    }
    times: dict[str, list[float]] = {"loop": [], **{name: [] for name in others}}

    def timed(name: str, began: float, steps: int) -> None:
        sync()
        took = time.perf_counter() - began
        if steps == WARM_STEPS:
            print(f"    {name}: first {steps} steps {took:.1f} s", flush=True)
        else:
            times[name].append(took / steps)

    def batches(span: range) -> Iterator[LoadedBatch]:
        for steps in (WARM_STEPS, *[TURN_STEPS] * turns):
            sync()
            began = time.perf_counter()
            for i in range(steps):
                yield LoadedBatch(case.batches[i % len(case.batches)], [], 0.0)
            timed("loop", began, steps)
            for name, other in others.items():
                began = time.perf_counter()
                other(steps)
                timed(name, began, steps)
        # The loop asks for one more: that is how the last turn's end is seen
        yield LoadedBatch(case.batches[0], [], 0.0)

    train = Train(
        steps=total,
        global_batch=len(case.batches[0]),
        lr=1e-5,
        warmup=0.0,
        precision="bf16" if device.type == "cuda" else "fp32",
        compile=COMPILE,
        log_every_steps=10,
        augment=False,
        **case.train,
    )
    loop.fit(
        loop.TrainingRun(
            task=case.task,
            technique=Full(),
            train=train,
            steps=total,
            seed=0,
            batches=batches,
            preprocess=lambda batch, training: batch,
            keeper=loop.KeepBest(case.metric, "last"),
            ranks=Ranks(device=device),
        )
    )
    return times


def run(name: str, device: Any, quick: bool, turns: int) -> tuple[Case, dict[str, list[float]]]:
    import torch

    make, batch = CASES[name]
    for rows in (8,) if quick else (batch, batch // 2):
        print(f"  {name}: batch {rows}", flush=True)
        try:
            torch._dynamo.reset()
            case = make(device, rows, quick)
            return case, measure(case, device, turns)
        except torch.cuda.OutOfMemoryError:
            case = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
            print(f"    out of memory with batch {rows}", flush=True)
    raise MemoryError(f"{name} does not fit in this GPU's memory")


def main() -> None:
    global COMPILE
    args = timing.options(
        __doc__,
        repeats=3,
        case={"choices": [*CASES], "help": "one case only"},
        no_compile={"action": "store_true", "help": "eager"},
        minutes={
            "type": float,
            "default": 8.0,
            "help": "begin no case that could end later than this",
        },
    )
    import torch

    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, results, lines = timing.describe(args), {}, []
    if device.type == "cpu" and not args.quick:
        raise SystemExit("no GPU here; --quick shows on a CPU that the script runs")
    COMPILE = not (args.no_compile or args.quick)
    if args.quick:
        torch.set_num_threads(1)
    for name in [args.case] if args.case else CASES:
        if not args.case and time.perf_counter() - began > 60 * args.minutes - CASE_SECONDS:
            print(
                f"  {name}: left out, --minutes {args.minutes:g} would not be kept; run it "
                f"with --case {name}"
            )
            continue
        try:
            case, times = run(name, device, args.quick, args.repeats)
        except Exception as error:  # the other cases still have their numbers
            print(f"    FAILED: {type(error).__name__}: {str(error)[:500]}", flush=True)
            results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            lines.append([name, "", "", "", "", "FAILED, see above"])
            continue
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rates = {side: [case.units / t for t in values] for side, values in times.items()}
        results[name] = {
            "rates": rates,
            "unit": case.unit,
            "beside": case.beside,
            "peak_gib": memory,
        }
        for side, values in rates.items():
            against = timing.ratio(rates["loop"], values)
            note = {
                "loop": f"peak {memory:.0f} GiB",
                "bare": timing.verdict(against.median >= 0.97, "loop at least 0.97"),
                "plain": "",
            }[side]
            lines.append(
                [
                    name,
                    side,
                    timing.Spread.of(values).text(4),
                    case.unit,
                    "" if side == "loop" else against.text(4),
                    note,
                ]
            )
            print(f"    {name} {side}: {timing.Spread.of(values).text(4)} {case.unit}", flush=True)
        print(f"    an H100 in a bare loop: {case.beside}", flush=True)
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    assert "ray" not in sys.modules, "a step of the loop must not need Ray"
    timing.table(
        "Step on one device, median [min, max] over turns",
        ["case", "side", "rate", "unit", "loop / side", "note"],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
