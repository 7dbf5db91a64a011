"""One process of several with a part of the tail; test_shards.py starts it by torch's launcher."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

from cprec_recbole import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.parallel.exchange import Group
from cprec_recbole.parallel.shards import ShardedBlock, gathered_state, own_state, spread_parameters
from cprec_recbole.partition import Partition
from cprec_recbole.softmax import SoftmaxHead, build_softmax

DIM = 8
# the last has fewer rows in a block than there are processes
LAYOUTS = [((6, 40, 61), (8, 3, 1)), ((9, 30), (8, 8)), ((5, 2, 33), (4, 2, 2))]


def head_of(kind: str, layout, group: Group | None) -> SoftmaxHead:
    """The same head in every process, spread where there is a group."""
    sizes, ranks = layout
    torch.manual_seed(11)
    order = torch.cat([torch.zeros(1).long(), torch.randperm(sum(sizes) - 1) + 1])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    tail = {} if group is None else {"make_tail": partial(ShardedBlock, group=group)}
    torch.manual_seed(12)
    table = BlockEmbedding(Partition(order, ends), ranks, DIM, **tail)
    head = build_softmax(kind, table)
    if kind == "tree":
        torch.nn.init.normal_(head.clusters)
    return head


def rows_of(rank: int, world: int, n: int) -> slice:
    """Uneven shares: all but the last process have few rows, the first of three or more none."""
    ends = [0, *(2 * r if world > 2 else 3 + r for r in range(world - 1)), n]
    return slice(ends[rank], ends[rank + 1])


def check(kind: str, layout, group: Group) -> None:
    whole, spread = head_of(kind, layout, None), head_of(kind, layout, group)
    same(spread, whole)
    n, n_items = 23, whole.table.partition.n_items
    items = torch.randint(0, n_items, (n,))
    target = torch.randint(1, n_items, (n,))
    hidden = torch.randn(n, DIM)
    mine = rows_of(group.rank, group.world, n)

    def objective(head: SoftmaxHead, part: slice) -> torch.Tensor:
        """Look-ups and a loss, as the mean over the rows of all processes."""
        count = part.stop - part.start
        states = hidden[part] + head.table(items[part])
        share = max(1, count) / n
        penalty = head.table.norm() * (count / n)
        return head.loss(states, target[part]) * share + penalty

    expected = objective(whole, slice(0, n))
    expected.backward()
    found = objective(spread, mine)
    found.backward()
    total = found.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    own = {id(p) for p in spread_parameters(spread)}
    for (name, p), q in zip(spread.named_parameters(), whole.parameters(), strict=True):
        gradient = torch.zeros_like(q) if p.grad is None else p.grad
        if id(p) in own:
            gradient = p.grad.full_tensor()
        else:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, q.grad, msg=lambda text, name=name: f"{name}: {text}")

    exclude = torch.randint(0, n_items, (n, 5))
    allowed = torch.randperm(n_items - 1)[: n_items // 2] + 1
    for options in ({}, {"exclude": exclude}, {"allowed": allowed}):
        wanted = whole.topk(hidden, 4, **options)
        options = {k: v[mine] if k == "exclude" else v for k, v in options.items()}
        best = spread.topk(hidden[mine], 4, **options)
        assert torch.equal(best.items, wanted.items[mine]), (kind, options)
        torch.testing.assert_close(best.scores, wanted.scores[mine])
    if kind == "full":
        found = spread.score(hidden[mine], exclude[mine])
        torch.testing.assert_close(found, whole.score(hidden, exclude)[mine])
    for refused in (spread.log_prob, lambda _: spread.build_index()):
        with pytest.raises(CompressionError, match="spread over"):
            refused(hidden)
    with torch.no_grad():
        other = head_of(kind, layout, group)
        for p in whole.parameters():
            p.add_(1.0)
        other.load_state_dict(own_state(other, whole.state_dict()))
    same(other, whole)


def same(spread: SoftmaxHead, whole: SoftmaxHead) -> None:
    """Whether blocks that are put together are those of one process."""
    state = gathered_state(spread)
    for name, value in whole.state_dict().items():
        found = state[name]
        if dist.get_rank() and ".weight" in name and len(found) == 0:
            continue  # only the first process has it
        assert torch.equal(found, value), name


def ties(group: Group) -> None:
    """Equal rows on several processes come by lower item id."""
    whole, spread = (head_of("full", LAYOUTS[0], g) for g in (None, group))
    with torch.no_grad():
        for head in (whole, spread):
            for block in head.tails:
                rows = block.own_rows if isinstance(block, ShardedBlock) else block.weight
                rows.fill_(1.0)
    hidden = torch.randn(3, DIM)
    assert torch.equal(spread.topk(hidden, 30).items, whole.topk(hidden, 30).items)


def near_ties(group: Group) -> None:
    """So do those that a large logarithm of the block's share rounds together."""
    whole, spread = (head_of("tree", LAYOUTS[0], g) for g in (None, group))
    with torch.no_grad():
        for head in (whole, spread):
            for parameter in head.parameters():
                own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                own.mul_(0.1)
            head.clusters.fill_(-1e6)
    hidden = torch.ones(3, DIM) / DIM
    options = {"allowed": whole.table.partition.item_at[6:].long()}  # of the tail alone
    assert torch.equal(
        spread.topk(hidden, 5, **options).items, whole.topk(hidden, 5, **options).items
    )


def not_numbers(group: Group) -> None:
    """Hidden states of one process that are no numbers are an error in all: none waits for ever."""
    spread = head_of("full", LAYOUTS[0], group)
    hidden = torch.full((2, DIM), torch.nan if group.rank == 0 else 1.0)
    with pytest.raises(CompressionError, match="`hidden` to hold finite numbers"):
        spread.topk(hidden, 3)


def main() -> None:
    dist.init_process_group("gloo")
    group = Group.current()
    for layout in LAYOUTS:
        for kind in ("full", "tree"):
            check(kind, layout, group)
    ties(group)
    near_ties(group)
    not_numbers(group)
    print("as one process", group.rank, file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
