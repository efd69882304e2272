"""How sure a share is, and whether two settings differ: no more than counting allows."""

import math


Z95 = 1.959963984540054  # of the normal distribution, for 95 %


def wilson_interval(hits: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share at 95 % (Wilson 1927), which holds for few rows, too, and for shares of 0 and 1.

    Args:
        hits: what was counted, at most `total`.
        total: out of how many; of none, nothing is known.
        z: how many standard deviations wide it is to either side.
    """
    if total == 0:
        return 0.0, 1.0
    share, slack = hits / total, z * z / total
    centre, spread = share + slack / 2, z * math.sqrt(share * (1 - share) / total + slack / (4 * total))
    low, high = (centre - spread) / (1 + slack), (centre + spread) / (1 + slack)
    return low if hits else 0.0, high if hits < total else 1.0


def mcnemar_p_value(better: int, worse: int) -> float:
    """How often chance alone splits the rows on which two settings differ so unevenly (McNemar's test, exact)."""
    differing, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(differing, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)
