"""One picture for each query, no picture twice, such that the sum of the scores is as large as can be.

Shortest augmenting paths (Jonker and Volgenant, 1987; rectangular as in Crouse, 2016) over the first pictures of each
query only. The dual prices that the method leaves behind prove the result optimal over all pictures, or name the
queries whose lists are too short; those are then lengthened. So neither scipy nor the matrix of all scores is needed.
"""

from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError

__all__ = ["assign"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Find = Callable[[Ids, int], tuple[Floats, Ids]]

_FIRST = 16  # pictures of each query that are looked at first


def assign(find: Find, queries: int) -> tuple[Floats, Ids]:
    """The picture of each query and its score: float64 [Q] and int64 [Q].

    `find(which, k)` gives the first k pictures of the queries `which` int64 [n]: scores falling and positions [n,K]
    as `Ranker.rank` does, K < k where there are no more than K. Where several assignments are equally good the
    same one is found every time. Raises ClipretError when there are fewer pictures than queries need.
    """
    depth = np.full(queries, _FIRST)
    lists: list[tuple[list[float], list[int]]] = [([], [])] * queries
    whole = np.zeros(queries, dtype=np.bool_)  # whether a query's list holds all there is
    wanted = np.arange(queries)
    while len(wanted):
        for k in np.unique(depth[wanted]).tolist():
            which = wanted[depth[wanted] == k]
            scores, positions = find(which, k)
            for query, line, row in zip(which.tolist(), scores, positions, strict=True):
                there = row >= 0
                lists[query] = (-line[there]).tolist(), row[there].tolist()
                whole[query] = len(lists[query][0]) < k
        column, price, blocked = _shortest_paths(lists)
        if blocked:
            wanted = np.array([query for query in blocked if not whole[query]], dtype=np.int64)
            if not len(wanted):
                raise ClipretError(
                    f"{len(blocked)} queries share fewer pictures than they are: there is not one for each; "
                    "add pictures, or lengthen the lists they come from"
                )
        else:
            # What a list leaves out costs no less than its last entry, and pictures outside have no price.
            short = [q for q in range(queries) if not whole[q] and price[q] > lists[q][0][-1]]
            wanted = np.array(short, dtype=np.int64)
        depth[wanted] *= 4
    chosen = [lists[query][1].index(column[query]) for query in range(queries)]
    scores = np.array([-lists[query][0][at] for query, at in enumerate(chosen)])
    return scores, np.array(column, dtype=np.int64)


def _shortest_paths(lists: list[tuple[list[float], list[int]]]) -> tuple[list[int], list[float], list[int]]:
    """The column of each row at the least total cost, each row's dual price, and, where a row cannot be seated, that
    row and those in its way (else none). `lists[row]`: costs, rising, and columns."""
    column, price = [-1] * len(lists), [0.0] * len(lists)
    owner: dict[int, int] = {}  # the row that has a column
    toll: dict[int, float] = {}  # the dual price of a column, at most 0
    for start in range(len(lists)):
        reached: dict[int, float] = {}  # the least cost of getting to a column
        came: dict[int, int] = {}  # from which row
        settled: list[int] = []
        done = set[int]()
        heap: list[tuple[float, int]] = []
        row, cost, rows = start, 0.0, [start]
        while True:
            for own, at in zip(*lists[row], strict=True):
                if at not in done:
                    through = cost + own - price[row] - toll.get(at, 0.0)
                    if through < reached.get(at, np.inf):
                        reached[at], came[at] = through, row
                        heappush(heap, (through, at))
            while heap and heap[0][1] in done:
                heappop(heap)
            if not heap:
                return column, price, rows
            cost, at = heappop(heap)
            done.add(at)
            if at not in owner:
                break
            settled.append(at)
            row = owner[at]
            rows.append(row)
        price[start] += cost
        for mine in settled:
            price[owner[mine]] += cost - reached[mine]
            toll[mine] = toll.get(mine, 0.0) - (cost - reached[mine])
        while True:
            row = came[at]
            owner[at], column[row], at = row, at, column[row]
            if row == start:
                break
    return column, price, []
