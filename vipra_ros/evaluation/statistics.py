"""Exact intervals for rates, and an exact paired test. Counts are small, so nothing here approximates."""

import math


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate that covers the true one with at least `confidence` (Clopper and Pearson 1934).

    Nothing observed says nothing: 0 of 0 gives (0, 1). Raises ValueError for impossible counts.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is impossible")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _root(lambda p: 1 - _at_most(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _root(lambda p: tail - _at_most(successes, trials, p))
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test: how likely is a split of the discordant pairs this uneven or
    more, if both policies are equally good.
    """
    pairs = only_a + only_b
    tail = sum(math.comb(pairs, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p)."""
    if p <= 0.0 or p >= 1.0:
        return float(p <= 0.0 or k >= n)
    log_p, log_q = math.log(p), math.log1p(-p)
    return math.fsum(math.exp(_log_choose(n, i) + i * log_p + (n - i) * log_q) for i in range(k + 1))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _root(increasing) -> float:
    """Where a function that increases over 0..1 crosses zero."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2
