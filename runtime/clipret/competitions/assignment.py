"""One image for each query, no image twice, with the largest sum of scores.

scipy solves the assignment among the first images of each query, because the matrix of all scores would not fit into
memory with a large gallery. The prices of the queries (the dual of the assignment) prove the result optimal over all
images, or name the queries whose rankings are too short and are then extended.
"""

from collections.abc import Callable

import numpy as np

from clipret.arrays import Floats, Ids
from clipret.errors import ClipretError, require

__all__ = ["assign"]

Find = Callable[[Ids, int], tuple[Floats, Ids]]

_FIRST = 16  # images of each query that are looked at first
_EPSILON = 1e-12  # of a score: sums of differences round


def assign(find: Find, queries: int) -> tuple[Floats, Ids]:
    """Assign an image to each query.

    Args:
        find: A function from query numbers int64 [n] and k to the first k images of these queries: descending scores
            and positions [n,K] as `Ranker.rank` returns them, with K < k if there are no more.
        queries: The number of queries.

    Returns:
        The score, float64 [Q], and the position, int64 [Q], of each query's image. If several assignments are equally
        good, always the same one.

    Raises:
        ClipretError: There are fewer images than queries, or scipy is missing.
    """
    depth = np.full(queries, _FIRST)
    lists: list[tuple[Floats, Ids]] = [(np.empty(0), np.empty(0, np.int64))] * queries
    whole = np.zeros(queries, dtype=np.bool_)  # whether a query's list holds all there is
    wanted = np.arange(queries)
    while True:
        for k in np.unique(depth[wanted]).tolist():
            which = wanted[depth[wanted] == k]
            for query, line, row in zip(which.tolist(), *find(which, k), strict=True):
                lists[query] = line[row >= 0], row[row >= 0]
                whole[query] = len(lists[query][0]) < k
        rows = np.repeat(np.arange(queries), [len(row) for _, row in lists])
        scores, positions = (np.concatenate(part) for part in zip(*lists, strict=True))
        # Of the images that no other query lists, the best is enough: a list is in the order of its scores.
        _, at, count = np.unique(positions, return_inverse=True, return_counts=True)
        alone = np.flatnonzero(count[at] == 1)
        keep = count[at] > 1
        keep[alone[np.unique(rows[alone], return_index=True)[1]]] = True
        rows, scores, positions = rows[keep], scores[keep], positions[keep]
        names, columns = np.unique(positions, return_inverse=True)
        chosen = _best(rows, columns, scores, (queries, len(names)))
        if chosen is None:  # nothing tells whose lists are in the way
            wanted = np.flatnonzero(~whole)
            if not len(wanted):
                raise ClipretError(
                    f"not each of the {queries} queries can have an image of its own: add images, or lengthen the "
                    "lists they come from"
                )
        else:
            values = scores[chosen]
            # What a list leaves out scores no more than its last entry, and images outside have no price.
            last = np.array([line[-1] for line, _ in lists])
            wanted = np.flatnonzero(~whole & (_prices(rows, columns, scores, chosen) < last))
            if not len(wanted):
                return values, positions[chosen]
        depth[wanted] *= 4


def _best(rows: Ids, columns: Ids, scores: Floats, shape: tuple[int, int]) -> Ids | None:
    """Which entries of a matrix are the assignment, one of each row; None where there is no room for every row."""
    if shape[1] < shape[0]:
        return None
    costs = np.full(shape, np.inf)
    costs[rows, columns] = -scores
    try:
        _, taken = require("scipy.optimize", "assignment").linear_sum_assignment(costs)
    except ValueError:  # what it says of that
        return None
    return np.flatnonzero(columns == taken[rows])


def _prices(rows: Ids, columns: Ids, scores: Floats, chosen: Ids) -> Floats:
    """What each query's place is worth: no image of a lower score could make the assignment better.

    The largest prices that there are: no query's is above its own score, nor above what another one's is and the
    change in scores, if that one took its image. Such chains end, since no ring of exchanges gains anything.
    """
    own = scores[chosen]
    owner = np.full(columns.max() + 1, -1)
    owner[columns[chosen]] = rows[chosen]
    other = (owner[columns] >= 0) & (owner[columns] != rows)
    rows, holder = rows[other], owner[columns[other]]
    change = own[holder] - scores[other]
    price = own.copy()
    for _ in range(len(own)):
        before = price.copy()
        np.minimum.at(price, holder, before[rows] + change)
        if (before - price).max() <= _EPSILON:
            break
    return price
