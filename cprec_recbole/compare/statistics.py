"""Is one contender better than another? Paired differences over users, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cprec_recbole.config import CompressionError

RESAMPLES = 10_000
LEVEL = 0.95
_AT_A_TIME = 2**22  # numbers drawn at a time: 32 MiB


@dataclass(frozen=True)
class Difference:
    """A mean difference over users and its interval.

    Attributes:
        mean: of the users' differences.
        low: lower end of the interval.
        high: upper end.
        users: how many users.
        seeds: how many seeds each user's difference is the mean of.
    """

    mean: float
    low: float
    high: float
    users: int
    seeds: int

    @property
    def verdict(self) -> str:
        """`better` where the interval is above zero, `worse` where it is below it, else `not told
        apart`: the interval says how large a difference may still be."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not told apart"


def paired_difference(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """The mean over users of `ours - theirs`, with a percentile bootstrap interval.

    A user's difference is averaged over seeds first; then users are resampled. The interval says
    what another sample of users would give for these trainings, not what other trainings would.

    Args:
        ours: one contender's value for each user, `[users]` for each seed.
        theirs: the other's, the same users and seeds in the same order.
        resamples: how many samples of users are drawn.
        level: share of the resampled means that lie within the interval.
        seed: of the draws.

    Raises:
        CompressionError: nothing to compare, or values of other users or seeds.
    """
    if not len(ours) or len(ours) != len(theirs):
        raise CompressionError(
            f"Expected `theirs` to have the seeds of `ours`, one at least, but got {len(theirs)} "
            f"for {len(ours)}."
        )
    shapes = {np.shape(values) for values in (*ours, *theirs)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
        raise CompressionError(
            f"Expected values of the same users, [users] for each seed, but got {sorted(shapes)}."
        )
    pairs = zip(ours, theirs)
    mine = np.mean([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs], 0)
    mine = mine.round(9)  # equal but for rounding is equal
    means = resampled_means(mine, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(mine.mean()), float(low), float(high), len(mine), len(ours))


def resampled_means(
    values: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Means of samples of users, drawn with replacement and as large as the users, `[resamples]`.

    Most users have a difference of zero. How many of a sample have another one follows a binomial
    law; only those are drawn.
    """
    others = values[values != 0]
    if not len(others):
        return np.zeros(resamples)
    n_drawn = generator.binomial(len(values), len(others) / len(values), size=resamples)
    rows = max(1, _AT_A_TIME // max(1, int(n_drawn.max())))
    sums = []
    for start in range(0, resamples, rows):
        wanted = n_drawn[start : start + rows, None]
        drawn = generator.integers(len(others), size=(len(wanted), int(wanted.max())))
        counted = np.arange(drawn.shape[1]) < wanted
        sums.append(np.where(counted, others[drawn], 0.0).sum(1))
    return np.concatenate(sums) / len(values)
