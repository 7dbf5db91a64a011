"""Reading a strip: logits in pieces that fit the cache, of which only maxima and sums are kept.

Arrays have the rows of the strip first and the batch second: so a thin product, its maxima over
groups of rows and its sums all run along contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cprec_recbole.partition import PADDING
from cprec_recbole.search.settle import PIECE
from cprec_recbole.search.strips import GroupedStrip, Strip
from cprec_recbole.search.topk import Barred

_ANY_GROUP = 64  # where maxima are not asked for
_LOG2_E = math.log2(math.e)


class TooManyCandidates(Exception):
    """So many items tie for the last place that they cannot be kept together."""


class Candidates(NamedTuple):
    """Items that may be among the best, in no order.

    Attributes:
        columns: row of the batch, `[C]`.
        positions: position of the item in popularity order, `[C]`; 0 is none.
        logits: its logit, `[C]`.
    """

    columns: Tensor
    positions: Tensor
    logits: Tensor


class Reader:
    """A strip, the queries of a batch, and the items that the batch must not get.

    Args:
        strip: the rows.
        query: of each row of the batch, `[r, B]`.
        barred: items that a row must not get.
        group: rows to a group where the strip is not grouped itself.

    Attributes:
        rows_read: rows read so far, each for the whole batch.
    """

    def __init__(self, strip: Strip, query: Tensor, barred: Barred, group: int) -> None:
        self.strip, self.query, self._factor = strip, query, strip.factor(query)
        self.group = strip.group if isinstance(strip, GroupedStrip) else group
        self.n_groups = -(-len(strip.codes) // self.group)
        self.rows_read = 0
        self._barred = barred.positions, barred.rows  # none of them, if there are none
        if len(barred.rows):
            inside, rows = strip.find(barred.positions)
            order = rows.argsort()
            self._barred = rows[order], barred.rows[inside][order]

    def n_logits(self, groups: Tensor | None = None) -> int:
        """Logits of all groups, or of some."""
        n_groups = self.n_groups if groups is None else len(groups)
        return n_groups * self.group * self.query.shape[1]

    def logits(self, groups: Tensor | None = None) -> Tensor:
        """All logits of all groups, or of some if grouped, `[G s, B]`; barred ones are -inf."""
        if self.n_logits(groups) <= PIECE:  # one piece, or none
            return next((piece for piece, _ in self._pieces(groups)), self._nothing())
        return torch.cat([piece.clone() for piece, _ in self._pieces(groups)])

    def _nothing(self) -> Tensor:
        return self.query.new_empty(0, self.query.shape[1])

    def maxima(self, groups: Tensor | None = None) -> Tensor:
        """Best logit that is not barred of each group, or of some if grouped, `[G, B]`."""
        best = [self._best(piece) for piece, _ in self._pieces(groups)]
        return best[0] if len(best) == 1 else torch.cat([self._nothing(), *best])

    def maxima_and_log_sum(self) -> tuple[Tensor, Tensor]:
        """Maxima of all groups, and the log of the summed exponentials of all rows, barred ones
        too, `[G, B], [B]`; the log in float64."""
        if not self.n_groups:
            return self.maxima(), self.query.new_full((self.query.shape[1],), -torch.inf).double()
        peak = self.query.new_full((self.query.shape[1],), -torch.inf)
        total = torch.zeros_like(peak, dtype=torch.float64)
        maxima = []
        for piece, at in self._pieces(None, bar=False):
            best = self._best(piece)
            higher = torch.maximum(peak, best.amax(0))
            if len(at[0]):
                barred = piece[at]
                piece[at] = -torch.inf
                best = self._best(piece)
                piece[at] = barred
            maxima.append(best)
            # powers of two: exp2 takes half the time of exp
            part = piece.sub_(higher).mul_(_LOG2_E).exp2_().sum(0)
            total = total * (peak - higher).double().exp() + part
            peak = higher
        return torch.cat(maxima), peak.double() + total.log()

    def among(self, logits: Tensor, floor: Tensor, groups: Tensor | None = None) -> Candidates:
        """The items whose logits are not below a floor, `[G s, B], [B]`; of `groups`, if not of
        all."""
        at, columns = (logits >= floor).nonzero().unbind(1)
        rows = at if groups is None else groups[at // self.group] * self.group + at % self.group
        positions = self.strip.positions(rows)
        return Candidates(columns, positions, logits[at, columns])

    def above(self, maxima: Tensor, floor: Tensor, groups: Tensor | None = None) -> Candidates:
        """The same, given only the best logit of each group, `[G, B]`; barred items too.

        Raises:
            TooManyCandidates: more than `PIECE` of them.
        """
        found, columns = (maxima >= floor).nonzero().unbind(1)
        found = found if groups is None else groups[found]
        per_piece = max(1, PIECE // (self.group * len(self._factor)))
        parts, total = [], 0
        for some, here in zip(found.split(per_piece), columns.split(per_piece)):
            parts.append(self._above(some, here, floor))
            total += len(parts[-1].columns)
            if total > PIECE:
                raise TooManyCandidates
        return parts[0] if len(parts) == 1 else Candidates(*(torch.cat(p) for p in zip(*parts)))

    def _above(self, groups: Tensor, columns: Tensor, floor: Tensor) -> Candidates:
        """As above, of pairs of a group and a row of the batch, `[P], [P]`."""
        rows = groups.unsqueeze(1) * self.group + torch.arange(self.group, device=groups.device)
        n_rows, rank = self.strip.codes.shape
        if isinstance(self.strip, GroupedStrip):
            codes = self.strip.members(groups)
        else:
            codes = self.strip.codes[rows.clamp(max=n_rows - 1).flatten()]
            codes = codes.view(-1, self.group, rank)
        logits = torch.bmm(codes, self._factor.T[columns].unsqueeze(2)).squeeze(2)
        logits = logits.masked_fill_(rows >= n_rows, -torch.inf)
        pair, slot = (logits >= floor[columns].unsqueeze(1)).nonzero().unbind(1)
        rows = rows[pair, slot]
        positions = self.strip.positions(rows.clamp(max=n_rows - 1))
        positions = positions.masked_fill(rows >= n_rows, PADDING)
        return Candidates(columns[pair], positions, logits[pair, slot])

    def _pieces(
        self, groups: Tensor | None, *, bar: bool = True
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Logits of runs of whole groups, `[P s, B]`, in one buffer, and where they are barred;
        those are -inf if `bar`."""
        codes, size = self.strip.codes, self.group
        count = self.n_groups if groups is None else len(groups)
        rows, columns = self._barred if groups is None else self._barred_of(groups)
        per_piece = max(1, min(count, PIECE // (size * self.query.shape[1])))
        firsts = range(0, count, per_piece)
        cuts = [0] * (len(firsts) + 1)
        if len(rows):
            at = torch.tensor([*firsts, count], device=rows.device) * size
            cuts = torch.searchsorted(rows, at).tolist()
        one = groups is None and self.strip.keep_columns and self.query.shape[1] == 1
        buffer = self.query.new_empty(0 if one else per_piece * size, self.query.shape[1])
        for i, first in enumerate(firsts):
            if groups is None:
                start, end = first * size, min(len(codes), (first + per_piece) * size)
            else:
                start, end = 0, size * len(groups[first : first + per_piece])
            if one:
                piece = torch.mm(self._factor.T, self.strip.columns[:, start:end]).T
            elif groups is None:
                piece = self.strip.multiply(start, end, self._factor, buffer[: end - start])
            else:
                part = self._grouped.members(groups[first : first + per_piece]).flatten(0, 1)
                piece = torch.mm(part, self._factor, out=buffer[:end])
            self.rows_read += end - start
            here = slice(cuts[i], cuts[i + 1])
            barred = rows[here] - first * size, columns[here]
            if bar and len(barred[0]):
                piece[barred] = -torch.inf
            yield piece, barred

    @property
    def _grouped(self) -> GroupedStrip:
        return cast(GroupedStrip, self.strip)  # only of these are some groups asked for

    def _barred_of(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Barred rows as they lie in some groups read after one another."""
        rows, columns = self._barred
        if not len(rows) or not len(groups):
            return rows[:0], columns[:0]
        at = torch.searchsorted(groups, rows // self.group).clamp(max=len(groups) - 1)
        inside = groups[at] == rows // self.group
        return (at * self.group + rows % self.group)[inside], columns[inside]

    def _best(self, piece: Tensor) -> Tensor:
        """Maxima of the groups of a piece, of which the last may be short, `[P, B]`."""
        whole = len(piece) // self.group * self.group
        best = piece[:whole].view(-1, self.group, piece.shape[1]).amax(1)
        if whole < len(piece):
            best = torch.cat([best, piece[whole:].amax(0, keepdim=True)])
        return best


def log_sum_of(strip: Strip, hidden: Tensor) -> Tensor:
    """Log of the summed exponentials of a strip's logits, `[B, d] -> [B]`."""
    query, nothing = strip.query(hidden).T.contiguous(), Barred.nothing(hidden.device)
    return Reader(strip, query, nothing, _ANY_GROUP).maxima_and_log_sum()[1]
