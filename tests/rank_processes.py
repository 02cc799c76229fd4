"""Two ranks of one run in processes of their own, which import once for all tests (fixture
``team``).
"""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.train.ranks import Ranks


def serve(rank: int, count: int, file: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=30),
    )
    while (message := pipe.recv()) is not None:
        work, args, words = message
        try:
            pipe.send((work(Ranks(rank, count), *args, **words), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Team:
    """Processes that import once; a call runs one function on all of them and gives their results
    by rank.
    """

    def __init__(self, count: int):
        self.count, self.processes = count, []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        file = Path(tempfile.mkdtemp(), "store")
        ends = [context.Pipe() for _ in range(self.count)]
        self.pipes = [mine for mine, _ in ends]
        self.processes = [
            context.Process(target=serve, args=(rank, self.count, str(file), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, work, *args, seconds: float = 120, **words):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((work, args, words))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                self.stop()
                pytest.fail(f"rank {rank} hangs in {work.__name__}")
            answers.append(pipe.recv())
        if errors := [error for _, error in answers if error]:
            self.stop()  # the ranks may no longer be at the same place
            pytest.fail("\n".join(errors))
        return [answer for answer, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
