"""Packed documents against padded ones, the loop against HF Trainer on one corpus, and a small
GPT against a bare torch loop.

    .venv/bin/python tests/benchmarks/packing.py --json packing.json      # about 12 minutes on 2 quiet cores; --quick: 1 minute
    .venv/bin/python tests/benchmarks/packing.py --case gpu               # on a GPU: GPT-2 124M and BERT-base at 512, about 5 minutes

``padding``: a small BERT with masked LM, the same step over documents of lognormal lengths, once
packed and once padded to the longest of each batch of 8; both steps hold about as many positions.
What counts is useful tokens (those that are no padding) a second. Target: 1.7x. ``trainer``: the
loop on packed rows against transformers.Trainer with BertForMaskedLM of the same size and its own
data collator, on the same corpus (wikitext2 of ONETOMANY_DATA, else texts of lognormal lengths).
``full``: Trainer on rows that were filled as its examples do it (no padding, no document mask).
``padded``: a row a document, padded to the longest of 8. Targets: 1.0x of full, 1.7x of padded in
useful tokens. ``shakespeare``: bits per character of a small GPT after the same number of steps
from the same weights over the same batches, by the loop and by a bare loop around GPT2LMHeadModel.
Target: within 0.02. ``gpu``: gpu_step's loops on rows packed with lognormal lengths; a row counts
its useful tokens. Targets: 500k and 560k tokens/s on an H100.

On a machine that others use as well, ``--clock processor`` counts the processor time of this
process instead of the clock.

Measured 2026-11-25 on 2 cores with a load of 14 to 18 from others (so by ``--clock processor``,
``--threads 1 --repeats 3``; median [min, max] of useful tokens/s and of ratios turn by turn):
``padding`` 60.4 % padding, packed 2956 [2675, 3041], padded 1235 [1075, 1262], 2.41x [2.17, 2.75];
``trainer`` on wikitext2 (50.2 % padding) loop 2710 [2489, 2778], full rows 2088 [1883, 2105] =
1.30x [1.18, 1.48], padded 1015 [1014, 1016] = 2.67x [2.45, 2.74]; ``shakespeare`` (one turn) 3.3734
bits by both, the loop 1.02x as fast. ``gpu`` was not run.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timing

from pipeline.core.specs import Architecture, ObjectiveSpec

WARM_STEPS = 3
SIDE_BATCH = 8
"""Documents that are padded to the longest of them."""
SIGMA = 0.9
"""Of the logarithm of the lengths: more than half of what a padded batch of 8 holds is then
padding.
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


class Setting:
    """What all cases share: the device, the clock and the sizes."""

    def __init__(self, args: Any):
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clock = CLOCKS[args.clock]
        self.quick, big = args.quick, self.device.type == "cuda" and not args.quick
        self.length = 32 if args.quick else (512 if big else 256)
        self.sizes = (
            {"layers": 1, "hidden": 32, "heads": 2}
            if args.quick
            else (
                {"layers": 12, "hidden": 768, "heads": 12}
                if big
                else {"layers": 4, "hidden": 256, "heads": 4}
            )
        )
        self.vocabulary, self.median = (512, 6) if args.quick else (8192, self.length / 7)
        self.steps = 4 if args.quick else 16

    def now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def autocast(self) -> Any:
        import torch

        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )


# ---------------------------------------------------------------- corpora


def lognormal_texts(n: int, median: float, seed: int = 0) -> list[str]:
    """Texts of words from a Zipf law; their numbers of words are lognormal."""
    import numpy as np

    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list(LETTERS), random.integers(2, 8))) for _ in range(3000)]
    share = 1 / np.arange(1, len(words) + 1)
    sizes = np.maximum(3, np.exp(random.normal(math.log(median), SIGMA, n)).astype(int))
    return [
        " ".join(words[i] for i in random.choice(len(words), size, p=share / share.sum()))
        for size in sizes
    ]


def wikitext() -> list[str] | None:
    """Paragraphs of wikitext2's validation part, where the data folder is told."""
    import pyarrow.parquet as pq

    folder = os.environ.get("ONETOMANY_DATA")
    if not folder:
        return None
    return pq.read_table(
        Path(folder, "text", "wikitext2_valid_test", "valid.parquet"), columns=["text"]
    )["text"].to_pylist()


def modality_of(
    texts: list[str], length: int, vocabulary: int, backbone: str = "transformers/bert"
) -> Any:
    import pyarrow as pa

    from pipeline.modalities.text import Text, TextOptions

    options = TextOptions(length=length, vocabulary=vocabulary if vocabulary >= 256 else 256)
    return Text(options, Text.fit(options, pa.table({"text": texts}), {"text": "text"}, backbone))


def rows_of(modality: Any, texts: list[str], objective: str, packed: bool) -> Any:
    """Rows in memory: packed ones, or one a text."""
    import pyarrow as pa

    from pipeline.data.manifests import Manifest, RowGroup, Selection
    from pipeline.data.stream import Decoder, Rows

    table, columns = pa.table({"text": texts}), {"text": "text"}
    if packed:
        table, _ = modality.pack(table, columns)
        columns = {name: name for name in table.column_names}
    arrays, _ = modality.decode(table, columns)
    manifest = Manifest(
        ("memory",),
        (RowGroup(0, 0, len(table), sum(a.nbytes for a in arrays.values())),),
        pa.schema([]),
        "memory",
    )
    return Rows(Selection(manifest), Decoder(modality, objective, {}, {}), arrays)


def batches_of(rows: Any, size: int, device: Any, most: int) -> list[Any]:
    """Batches of rows in their order, at most so many, on the device."""
    import numpy as np
    import torch

    from pipeline.core.contracts import Batch
    from pipeline.core.rng import row_keys

    out = []
    for i in range(0, len(rows) - size + 1, size):
        ids = np.arange(i, i + size)
        keys = torch.from_numpy(row_keys(0, np.zeros_like(ids), ids))
        out.append(
            Batch(
                ids,
                keys,
                rows.modality.collate({name: array[ids] for name, array in rows.arrays.items()}),
            ).to(device)
        )
        if len(out) == most:
            break
    return out


def useful(batch: Any) -> int:
    return (
        int((batch["segments"] > 0).sum()) if "segments" in batch.data else int(batch["mask"].sum())
    )


def task_of(
    modality: Any, architecture: str, sizes: dict[str, int], objective: str, **options: Any
) -> Any:
    from pipeline.checkpoints import bundle

    arch = Architecture(f"transformers/{architecture}", {**sizes, **options}, modality.inputs())
    return bundle.build_task(arch, ObjectiveSpec(objective, {}, {}), seed=0)


# ---------------------------------------------------------------- packed and padded


def bare_rate(setting: Setting, task: Any, batches: list[Any]) -> Callable[[], float]:
    """Useful tokens a second of plain steps: forward, backward, clip, fused AdamW."""
    import torch

    task = copy.deepcopy(task).to(setting.device).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    counts = [useful(batch) for batch in batches]
    taken = 0

    def step() -> int:
        nonlocal taken
        at = taken % len(batches)
        taken += 1
        with setting.autocast():
            loss, count, _ = task(batches[at])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return counts[at]

    def side() -> float:
        for _ in range(WARM_STEPS):
            step()
        began = setting.now()
        done = sum(step() for _ in range(setting.steps))
        return done / (setting.now() - began)

    return side


def padding(setting: Setting, repeats: int) -> tuple[dict[str, Any], list[list[str]]]:
    texts = lognormal_texts(400 if setting.quick else 3000, setting.median)
    modality = modality_of(texts, setting.length, setting.vocabulary)
    task = task_of(modality, "bert", setting.sizes, "mlm")
    padded = batches_of(
        rows_of(modality, texts, "mlm", packed=False), SIDE_BATCH, setting.device, 4 * setting.steps
    )
    held = [batch["tokens"].numel() for batch in padded]
    share = 1 - sum(useful(batch) for batch in padded) / sum(held)
    size = max(1, round(sum(held) / len(held) / setting.length))
    packed = batches_of(
        rows_of(modality, texts, "mlm", packed=True), size, setting.device, 4 * setting.steps
    )
    fill = sum(useful(batch) for batch in packed) / sum(batch["tokens"].numel() for batch in packed)
    print(
        f"  padding: {share:.1%} of the padded batches is padding, {1 - fill:.1%} of the packed "
        f"ones; {sum(held) / len(held):.0f} and {size * setting.length} positions a step"
    )
    rates = timing.interleaved(
        {"packed": bare_rate(setting, task, packed), "padded": bare_rate(setting, task, padded)},
        repeats,
    )
    gain = timing.ratio(rates["packed"], rates["padded"])
    lines = [
        ["padding", "packed", timing.Spread.of(rates["packed"]).text(4), "", f"fill {fill:.1%}"],
        [
            "padding",
            "padded",
            timing.Spread.of(rates["padded"]).text(4),
            gain.text(3),
            timing.verdict(
                gain.median >= 1.7 and share >= 0.5, f"1.7x at 50 % padding or more ({share:.1%})"
            ),
        ],
    ]
    return {
        "padding_share": share,
        "fill": fill,
        "useful_tokens_per_second": rates,
        "gain": gain,
    }, lines


# ---------------------------------------------------------------- HF Trainer


def loop_rate(setting: Setting, task: Any, rows: Any, size: int) -> Callable[[], float]:
    """Useful tokens a second of train/loop.fit, gathering and collating inside."""
    from pipeline.config.schema import Train
    from pipeline.data.plan import Plan
    from pipeline.data.stream import train_batches
    from pipeline.techniques.full import Full
    from pipeline.train import loop
    from pipeline.train.evaluate import device_preprocessing
    from pipeline.train.ranks import Ranks

    task, total = copy.deepcopy(task), WARM_STEPS + setting.steps + 1
    plan = Plan(len(rows), 0, size)
    train = Train(
        steps=total,
        global_batch=size,
        lr=1e-4,
        augment=False,
        log_every_steps=10,
        precision="bf16" if setting.device.type == "cuda" else "fp32",
    )

    def side() -> float:
        times: list[float] = []
        counts: list[int] = []

        def batches(span: range) -> Iterator[Any]:
            stream = train_batches(rows, plan, span)
            for _ in span:
                times.append(setting.now())
                loaded = next(stream)
                counts.append(useful(loaded[0]))
                yield loaded

        loop.fit(
            loop.TrainingRun(
                task=task,
                technique=Full(),
                train=train,
                steps=total,
                seed=0,
                batches=batches,
                preprocess=device_preprocessing(rows),
                keeper=loop.KeepBest("perplexity", "last"),
                ranks=Ranks(device=setting.device),
            )
        )
        return sum(counts[WARM_STEPS:-1]) / (times[-1] - times[WARM_STEPS])

    return side


def trainer_rate(
    setting: Setting, task: Any, modality: Any, rows: list[list[int]], size: int, folder: str
) -> Callable[[], float]:
    """Useful tokens a second of transformers.Trainer with BertForMaskedLM and its collator (dynamic
    padding, 15 % masks).
    """
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokens = [modality.tokenizer.id_to_token(i) for i in modality.state["specials"]]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(modality.tokenizer), **dict(zip(names, tokens, strict=True))
    )
    collate = hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    model = hf.BertForMaskedLM(task.backbone.model.config)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    total = WARM_STEPS + setting.steps + 1
    seen: list[int] = []

    def collated(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        seen.append(sum(len(example["input_ids"]) for example in examples))
        return collate(
            [{name: list(values) for name, values in example.items()} for example in examples]
        )

    class Clock(hf.TrainerCallback):
        def __init__(self):
            self.times: list[float] = []

        def on_step_end(self, args, state, control, **kw):
            self.times.append(setting.now())

    def side() -> float:
        clock, first = Clock(), len(seen)
        arguments = timing.trainer_arguments(
            folder,
            size,
            total,
            use_cpu=setting.device.type == "cpu",
            bf16=setting.device.type == "cuda",
            dataloader_drop_last=True,
        )
        trainer = hf.Trainer(
            model, arguments, train_dataset=data, data_collator=collated, callbacks=[clock]
        )
        trainer.remove_callback(hf.PrinterCallback)
        trainer.train()
        done = seen[first:][WARM_STEPS + 1 : total]  # those of the steps behind the first moment
        return sum(done) / (clock.times[-1] - clock.times[WARM_STEPS])

    return side


def trainer(setting: Setting, repeats: int) -> tuple[dict[str, Any], list[list[str]]]:
    texts = wikitext()
    where = "wikitext2" if texts else "texts of lognormal lengths"
    texts = [text for text in texts or lognormal_texts(3000, setting.median) if text.strip()]
    texts = texts[:300] if setting.quick else texts
    modality = modality_of(texts, setting.length, setting.vocabulary)
    task, size = task_of(modality, "bert", setting.sizes, "mlm"), SIDE_BATCH // 2
    _, _, cls, sep, _ = modality.state["specials"]
    encoded = [
        [cls, *found.ids, sep]
        for found in modality.tokenizer.encode_batch(texts, add_special_tokens=False)
    ]
    stream = [token for row in encoded for token in row]
    full = [
        stream[i : i + setting.length]
        for i in range(0, len(stream) - setting.length + 1, setting.length)
    ]
    cut = [
        [*row[: setting.length - 1], sep] if len(row) > setting.length else row for row in encoded
    ]
    longest = [
        max(map(len, cut[i : i + SIDE_BATCH]))
        for i in range(0, len(cut) - SIDE_BATCH + 1, SIDE_BATCH)
    ]
    share = 1 - sum(map(len, cut[: len(longest) * SIDE_BATCH])) / (SIDE_BATCH * sum(longest))
    print(
        f"  trainer: {where}, {len(texts)} documents, {len(full)} full rows of "
        f"{setting.length}; {share:.1%} padding in batches of {SIDE_BATCH}"
    )
    with tempfile.TemporaryDirectory() as folder:
        rates = timing.interleaved(
            {
                "loop": loop_rate(
                    setting, task, rows_of(modality, texts, "mlm", packed=True), size
                ),
                "full": trainer_rate(setting, task, modality, full, size, folder),
                "padded": trainer_rate(setting, task, modality, cut, SIDE_BATCH, folder),
            },
            repeats,
        )
    against = {side: timing.ratio(rates["loop"], rates[side]) for side in ("full", "padded")}
    lines = [
        ["trainer", "loop, packed", timing.Spread.of(rates["loop"]).text(4), "", where],
        [
            "trainer",
            "Trainer, full rows",
            timing.Spread.of(rates["full"]).text(4),
            against["full"].text(3),
            timing.verdict(against["full"].median >= 1.0, "1.0x"),
        ],
        [
            "trainer",
            "Trainer, padded",
            timing.Spread.of(rates["padded"]).text(4),
            against["padded"].text(3),
            timing.verdict(against["padded"].median >= 1.7, f"1.7x ({share:.1%} padding)"),
        ],
    ]
    return {
        "corpus": where,
        "padding_share": share,
        "useful_tokens_per_second": rates,
        "against": against,
    }, lines


# ---------------------------------------------------------------- a small GPT


def shakespeare(setting: Setting, repeats: int) -> tuple[dict[str, Any], list[list[str]]]:
    """Characters (bytes); the last tenth is held out. A turn has its own weights and order."""
    import torch

    folder = os.environ.get("ONETOMANY_DATA")
    if not folder:
        print("  shakespeare: left out, ONETOMANY_DATA is not set")
        return {}, []
    text = Path(folder, "text", "tinyshakespeare", "input.txt").read_text()
    text = text[:60_000] if setting.quick else text
    cut = len(text) * 9 // 10
    length, steps = (32, 8) if setting.quick else (128, 300)
    sizes = (
        {"layers": 1, "hidden": 32, "heads": 2}
        if setting.quick
        else {"layers": 4, "hidden": 128, "heads": 4}
    )
    modality = modality_of([text[:1000]], length, 256 + 5, "transformers/gpt2")
    train, held = (
        rows_of(modality, [part], "clm", packed=True) for part in (text[:cut], text[cut:])
    )
    checks = batches_of(held, 16, setting.device, 10**6)
    bits: dict[str, list[float]] = {"loop": [], "bare": []}
    seconds: dict[str, list[float]] = {"loop": [], "bare": []}
    for turn in range(repeats):
        task = task_of(modality, "gpt2", sizes, "clm", dropout=0.0)
        torch.manual_seed(turn)
        task.backbone.model.apply(task.backbone.model._init_weights)
        for name, side in (("loop", loop_bits), ("bare", bare_bits)):
            began = setting.now()
            model = side(setting, copy.deepcopy(task), train, steps, turn)
            seconds[name].append(setting.now() - began)
            bits[name].append(bits_per_character(model, checks))
            print(
                f"    turn {turn + 1}/{repeats}  {name}: {bits[name][-1]:.4f} bits a "
                f"character, {seconds[name][-1]:.1f} s",
                flush=True,
            )
    apart = timing.Spread.of([a - b for a, b in zip(bits["loop"], bits["bare"], strict=True)])
    speed = timing.ratio(seconds["bare"], seconds["loop"])
    lines = [
        [
            "shakespeare",
            "loop",
            timing.Spread.of(bits["loop"]).text(4) + " bits",
            "",
            f"{steps} steps of 16 x {length} characters",
        ],
        [
            "shakespeare",
            "bare",
            timing.Spread.of(bits["bare"]).text(4) + " bits",
            speed.text(3),
            timing.verdict(abs(apart.median) <= 0.02, f"within 0.02 bits ({apart.median:+.4f})"),
        ],
    ]
    return {"bits_per_character": bits, "seconds": seconds, "steps": steps}, lines


def shakespeare_plan(rows: Any, steps: int, seed: int) -> Any:
    from pipeline.data.plan import Plan
    from pipeline.data.stream import train_batches

    return train_batches(rows, Plan(len(rows), seed, 16), range(steps))


def loop_bits(
    setting: Setting, task: Any, rows: Any, steps: int, seed: int
) -> Callable[[Any], Any]:
    from pipeline.config.schema import Train
    from pipeline.techniques.full import Full
    from pipeline.train import loop
    from pipeline.train.evaluate import device_preprocessing
    from pipeline.train.ranks import Ranks

    train = Train(
        steps=steps,
        global_batch=16,
        lr=2e-3,
        warmup=0.1,
        weight_decay=0.05,
        augment=False,
        precision="fp32",
    )
    loop.fit(
        loop.TrainingRun(
            task=task,
            technique=Full(),
            train=train,
            steps=steps,
            seed=seed,
            batches=lambda span: shakespeare_plan(rows, steps, seed),
            preprocess=device_preprocessing(rows),
            keeper=loop.KeepBest("perplexity", "last"),
            ranks=Ranks(device=setting.device),
        )
    )
    return lambda batch: task.eval()(batch)[0]


def bare_bits(
    setting: Setting, task: Any, rows: Any, steps: int, seed: int
) -> Callable[[Any], Any]:
    """GPT2LMHeadModel with the task's weights in a loop as its tutorials write it."""
    import torch
    import transformers as hf

    model: Any = hf.GPT2LMHeadModel(task.backbone.model.config).to(setting.device).train()
    model.transformer.load_state_dict(task.backbone.model.state_dict())
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if (p.dim() > 1) == wide], "weight_decay": 0.05 * wide}
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999), fused=True)
    warm = round(0.1 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        ),
    )
    for loaded in shakespeare_plan(rows, steps, seed):
        tokens = loaded[0]["tokens"].to(setting.device)
        model(
            input_ids=tokens,
            labels=torch.where(loaded[0]["segments"].to(setting.device) > 0, tokens, -100),
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()

    def total(batch: Any) -> Any:
        labels = torch.where(batch["segments"] > 0, batch["tokens"], -100)
        return model(input_ids=batch["tokens"], labels=labels).loss * (labels[:, 1:] >= 0).sum()

    return total


def bits_per_character(total: Callable[[Any], Any], batches: list[Any]) -> float:
    """Mean loss in bits of the held-out characters that have one before them in their row: a token
    is a byte, and the text is ASCII.
    """
    import torch

    with torch.no_grad():
        loss = sum(float(total(batch)) for batch in batches)
    return loss / math.log(2) / sum(int((batch["segments"][:, 1:] > 0).sum()) for batch in batches)


# ---------------------------------------------------------------- a GPU


def gpu(setting: Setting, repeats: int) -> tuple[dict[str, Any], list[list[str]]]:
    """GPT-2 124M at 1024 and BERT-base at 512 on packed rows, bf16 and compiled, beside gpu_step's
    bare loops.
    """
    import gpu_step
    import torch

    out, lines = {}, []
    gpu_step.COMPILE = not setting.quick
    for name, target in (("gpt2", 500e3), ("bert512", 560e3)):
        torch._dynamo.reset()
        make, size = gpu_step.CASES[name]
        case = make(setting.device, 8 if setting.quick else size, setting.quick)
        case.batches[:] = [lognormal_rows(batch, seed) for seed, batch in enumerate(case.batches)]
        fill = sum(useful(batch) for batch in case.batches) / sum(
            batch["tokens"].numel() for batch in case.batches
        )
        rates = {
            side: [fill * case.units / t for t in times]
            for side, times in gpu_step.measure(case, setting.device, repeats).items()
        }
        out[name] = {"fill": fill, "useful_tokens_per_second": rates}
        for side, values in rates.items():
            against = "" if side == "loop" else timing.ratio(rates["loop"], values).text(3)
            note = (
                timing.verdict(
                    timing.Spread.of(values).median >= target,
                    f"{target / 1e3:.0f}k useful tokens/s, fill {fill:.1%}",
                )
                if side == "loop"
                else ""
            )
            lines.append([name, side, timing.Spread.of(values).text(4), against, note])
        del case
    return out, lines


def lognormal_rows(batch: Any, seed: int) -> Any:
    """The batch with its rows cut into documents of lognormal lengths, laid end to end as the text
    modality packs them.
    """
    import numpy as np
    import torch

    rows, length = batch["tokens"].shape
    random = np.random.default_rng(seed)
    ends = np.cumsum(
        np.maximum(
            5, np.exp(random.normal(math.log(length / 7), SIGMA, rows * length // 5))
        ).astype(int)
    )
    documents = np.searchsorted(ends, np.arange(rows * length), side="right").reshape(rows, length)
    segments = torch.from_numpy((documents - documents[:, :1] + 1).astype(np.int32))
    return batch.replace(segments=segments.to(batch["tokens"].device))


CASES = {"padding": padding, "trainer": trainer, "shakespeare": shakespeare, "gpu": gpu}


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=5,
        case={"choices": [*CASES], "help": "one case only"},
        clock={"choices": [*CLOCKS], "default": "wall", "help": "what seconds are"},
        threads={"type": int, "default": os.cpu_count(), "help": "torch threads"},
    )
    import torch

    torch.set_num_threads(1 if args.quick else args.threads)
    found, setting = timing.describe(args), Setting(args)
    if args.case == "gpu" and setting.device.type == "cpu" and not args.quick:
        raise SystemExit("no GPU here; --quick shows on a CPU that the script runs")
    results, lines = {}, []
    for name, case in CASES.items():
        if args.case == name or (
            not args.case and (name != "gpu" or setting.device.type == "cuda")
        ):
            results[name], more = case(setting, args.repeats)
            lines += more
    timing.table(
        f"Packed text on {setting.device.type}, seconds of the {args.clock}; median [min, max] "
        "over turns",
        ["case", "side", "useful tokens/s", "ours / side", "target"],
        lines,
    )
    timing.write(args, found, {**results, "clock": args.clock, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
