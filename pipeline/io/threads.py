"""Work for several threads: many reads, each of which waits for an answer of a disk or a store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = 16


def threaded_map(
    fn: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = THREADS,
    waiting: int | None = None,
) -> Iterator[Result]:
    """Yield the results of `fn` in order, computed by threads; a single item is computed here.

    At most `waiting` (twice the threads) are started and not yet taken; those not started are
    dropped when the caller stops early.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if len(first) < 2:
        yield from map(fn, first)  # a thread would take longer to begin than most files to read
        return
    items = chain(first, items)
    with ThreadPoolExecutor(threads) as pool:
        begun = deque(pool.submit(fn, item) for item in islice(items, waiting or 2 * threads))
        try:
            while begun:
                result = begun.popleft().result()
                begun.extend(pool.submit(fn, item) for item in islice(items, 1))
                yield result
        finally:
            for future in begun:
                future.cancel()
