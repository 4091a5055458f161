"""No more than asked for is made ahead, and what comes of it keeps its order."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from episodes.parallel import in_order


def test_results_keep_their_order_and_few_are_made_ahead():
    made: list[int] = []
    second = threading.Event()

    def make(n: int) -> int:
        if n == 1:
            second.set()
        elif n == 0:
            second.wait(20)  # the first is done last
        made.append(n)
        return n * n

    with ThreadPoolExecutor(3) as pool:
        got = []
        for result in in_order(pool, make, iter(range(20)), ahead=3):
            got.append(result)
            assert len(made) <= len(got) + 3
        assert got == [n * n for n in range(20)]
        assert list(in_order(pool, make, [], ahead=3)) == []


def test_an_error_comes_where_its_result_would():
    def make(n: int) -> float:
        return 1 / (2 - n)

    with ThreadPoolExecutor(2) as pool:
        results = in_order(pool, make, range(5), ahead=4)
        assert [next(results), next(results)] == [0.5, 1.0]
        with pytest.raises(ZeroDivisionError):
            next(results)
