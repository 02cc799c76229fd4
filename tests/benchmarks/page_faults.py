"""Steps of training on a CPU with the memory of freed tensors kept, and given back to the system.

    .venv/bin/python tests/benchmarks/page_faults.py --json faults.json      # about 3 minutes on 2 quiet cores; --quick: half a minute

Each side is a process of its own: `kept` with the variables that `prepare_ray` sets for Ray's
workers (`pipeline/io/ray_environment.py`, KEEP_MEMORY), `returned` without them, as glibc does by
itself. What counts is the processor time of a step, user and system, after three of warm-up, so
that other work on the machine hardly counts, and the page faults of a step. Target: kept is not
slower for any network, with at most a twentieth of the faults.

Seen (one thread, other work beside it, one turn), seconds of a step returned and kept, of them in
the system: wavenet 0.62 (0.096) and 0.54 (0.007), resnet18 at 96 px 0.53 (0.075) and 0.46 (0.002),
bert 0.41 (0.133) and 0.27 (0.002), gpt 1.21 (0.340) and 0.86 (0.005). Peak memory is between 1 %
less and 12 % more.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import timing

from pipeline.io.ray_environment import KEEP_MEMORY

NETWORKS = ("wavenet", "resnet18", "bert", "gpt")
WARM_UP = 3


def steps_of(network: str, quick: bool) -> dict[str, float]:
    """Seconds of processor time a step, user and system, and the process's peak memory in MiB."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = training_step(network, quick)
    count = 2 if quick else 10
    for _ in range(WARM_UP):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(count):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user": (after.ru_utime - before.ru_utime) / count,
        "system": (after.ru_stime - before.ru_stime) / count,
        "faults": (after.ru_minflt - before.ru_minflt) / count,
        "peak_mib": after.ru_maxrss / 1024,
    }


def training_step(network: str, quick: bool) -> Any:
    """A function that trains the network for one step, on random inputs of a usual size."""
    import torch
    from torch.nn import functional as F

    rows = 2 if quick else 8
    if network == "wavenet":  # a crop of a quarter of a second a row, as jobs/speech/wavenet_small
        from pipeline.checkpoints import bundle
        from pipeline.core.contracts import Batch
        from pipeline.core.specs import Architecture

        options = {"layers": 9, "stacks": 1, "residual": 32, "skip": 64, "pool": 80}
        inputs = {"features": "wave", "rate": 8000, "channels": 1, "convolutions": []}
        model = bundle.build_backbone(Architecture("wavenet/wavenet", options, inputs), seed=0)
        samples = 2000 if quick else 8000
        wave, keys = torch.rand(rows, samples) * 2 - 1, torch.arange(rows)
        mask = torch.ones(rows, samples, dtype=torch.bool)
        batch = Batch(keys.numpy(), keys, {"wave": wave, "mask": mask})

        def loss() -> torch.Tensor:
            return model(batch, want=("latent",)).latent.square().mean()

    elif network == "resnet18":
        import timm

        model = timm.create_model("resnet18", num_classes=10)
        images, labels = torch.randn(4 * rows, 3, 96, 96), torch.zeros(4 * rows, dtype=torch.long)

        def loss() -> torch.Tensor:
            return F.cross_entropy(model(images), labels)

    else:
        import transformers

        tokens = torch.randint(0, 1000, (2 * rows, 128))
        if network == "bert":
            config = transformers.BertConfig(
                vocab_size=8192, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=512,
            )  # fmt: skip
            model = transformers.BertForMaskedLM(config)
        else:
            config = transformers.GPT2Config(
                vocab_size=8192, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
            )
            model = transformers.GPT2LMHeadModel(config)

        def loss() -> torch.Tensor:
            return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())

    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def in_a_process(network: str, kept: bool, quick: bool) -> dict[str, float]:
    """`steps_of` in a new process: glibc reads its variables when a process starts."""
    env = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    words = ["--side", network, *(["--quick"] if quick else [])]
    ended = subprocess.run(
        [sys.executable, __file__, *words],
        env=env | (KEEP_MEMORY if kept else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=3,
        side={"choices": NETWORKS, "help": "what the script calls itself with: one side alone"},
        network={"choices": NETWORKS, "help": "this one alone"},
    )
    if args.side:
        print(json.dumps(steps_of(args.side, args.quick)))
        return
    found = timing.describe(args)
    results: dict[str, Any] = {}
    rows, met = [], True
    for network in [args.network] if args.network else NETWORKS:
        sides: dict[str, list[dict[str, float]]] = {"returned": [], "kept": []}
        for _ in range(args.repeats):
            for side, measured in sides.items():
                measured.append(in_a_process(network, side == "kept", args.quick))
        results[network] = sides
        whole = {
            side: [one["user"] + one["system"] for one in measured]
            for side, measured in sides.items()
        }
        faster = timing.ratio(whole["returned"], whole["kept"])
        fewer = timing.ratio(
            *([one["faults"] + 1 for one in sides[side]] for side in ("returned", "kept"))
        )
        met = met and faster.median >= 0.97 and fewer.median >= 20
        for side, measured in sides.items():
            rows.append(
                [
                    network,
                    side,
                    *(
                        timing.Spread.of([one[column] for one in measured]).text()
                        for column in ("user", "system", "faults", "peak_mib")
                    ),
                    faster.text() if side == "kept" else "",
                ]
            )
    header = ["network", "memory", "user s", "system s", "faults a step", "peak MiB", "as fast"]
    timing.table("one thread, a step of training", header, rows)
    print(timing.verdict(met, "no network slower, a twentieth of the page faults"))
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
