"""Work shared out to a pool without piling up what comes of it."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """function(item) of all items, in their order; `pool.map` would have all of them made at once.

    At most `ahead` (1 or more) are made or wait beyond the one that was asked for last.
    """
    left = iter(items)
    waiting = deque(pool.submit(function, item) for item in itertools.islice(left, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
        yield result
