"""recover(): a short fine-tuning that gives a compressed model the original's quality back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cprec_recbole.backbones import Reading
from cprec_recbole.compression.averaging import WeightAverage
from cprec_recbole.compression.distillation import Teacher
from cprec_recbole.compression.histories import Histories, histories_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.progress import Show, shown
from cprec_recbole.compression.quantize import in_float
from cprec_recbole.config import CompressionError, is_number, is_whole
from cprec_recbole.modes import in_eval_mode, with_dense_gradients, without_dropout
from cprec_recbole.outcome import Recovery
from cprec_recbole.partition import PADDING
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.saving.vocabulary import check_numbering
from cprec_recbole.training.evaluation import check_validation_data, evaluate, valid_metric
from cprec_recbole.training.optimizers import build_optimizer

# SASRec at ratio 3.5 on MovieLens-100K (seed 2020), loss on the validation data after 5 epochs, the
# original's 5.818: 6.009 with 2048 and 3e-3, 5.994 with 512 and 1e-3, 5.972 with 512 and 3e-3.
# SASRec at ratio 4 on amazon-beauty, share of NDCG@20 after 10 epochs, validation / test: 95.2 /
# 95.1% with 512, 96.6 / 96.1% with 256, 97.6 / 97.0% with 128
_BATCH_SIZE = 128
# Better than 3e-3 in 32 of 45 searches, by 3% on average: docs/compressing.md, and
# benchmarks/results/recovery-rates.md for originals that were trained at RecBole's .001
LEARNING_RATE = 1e-2
_LAST_RATE = 0.1  # of the learning rate, at the last step
_WARM_UP = 0.05  # of all steps: Adam knows no sizes yet, and its first steps go anywhere
_HIGHEST_RATE = 1e30  # Adam's first step is ten times that, which float32 must hold


def recover(
    small: CompressedRecommender,
    teacher: nn.Module | None,
    data: Any,
    epochs: int = 4,
    *,
    valid_data: Any = None,
    distillation: float = 0.5,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = _BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Recovery:
    """Fine-tune a compressed model, in place, on the data and on what its original predicts.

    The loss is the model's own, mixed with the divergence from the original's softmax: over all
    items where the model's softmax is flat; in a tree over the head's items and those of each
    target's own block, which it reads for those targets, so that the original's opinion costs no
    more than that. Adam, its rate rising over the first twentieth of the steps, then falling
    evenly. What counts is the average of the weights over the latest steps (see
    `compression.averaging`). With validation data the best epoch's average is kept, which may be
    the start.
    A model in int8 is trained in float, measured in int8 and in int8 again afterwards.

    Args:
        small: what `compress()` made; it is changed.
        teacher: the original that it was made from; None to fine-tune on the data alone, as after
            `add_items`.
        data: training data: RecBole's dataset or data loader, or lists of item ids.
        epochs: passes over the data.
        valid_data: RecBole's validation data, to report quality before and after each epoch.
        distillation: weight of the original's predictions, from 0 (none) to 1 (nothing else);
            without a teacher there are none.
        learning_rate: the highest, after the rise.
        batch_size: predictions a step, as RecBole's `train_batch_size`; fewer than that, for a
            recovery has few epochs and needs its steps.
        seed: of dropout and the order of batches. The process's random state is left as it was.
        progress: show a bar; a line an epoch where the output is no terminal.

    Returns:
        Recovery: metrics before and after each epoch, and which epoch was kept.

    Raises:
        CompressionError: models that do not belong together, data of another catalogue, options out
            of range, a loss that is no number. What was reached until then is kept, as it is
            on Ctrl-C.
    """
    if not isinstance(small, CompressedRecommender):
        raise CompressionError(
            f"Expected `small` to be a compressed model, but got {type(small).__name__}."
        )
    dtype = small.table.dtype
    if dtype == torch.float16:
        raise CompressionError(
            f"Expected `small` to be in float32, float64 or bfloat16, but got {dtype}, in which "
            "Adam's steps are lost; use small.float()."
        )
    original = None if teacher is None else Original.of(teacher)
    if original is not None:
        _check_pair(small, original)
    _check_numbers(epochs, batch_size, learning_rate, distillation, seed)
    if valid_data is not None:
        check_validation_data(valid_data)
    for given, name in ((data, "data"), (valid_data, "valid_data")):
        for model in (small, teacher):
            check_numbering(model, given, name)
    histories = histories_of(data, small.n_items, small.max_seq_length)
    # What the original says of every item keeps the model from learning its few labels by heart,
    # and dropout would hide from a small model what it is to repeat (SASRec as above: loss 5.868
    # without, 5.923 with 0.4 of it, 5.972 with all of it).
    teaches = original is not None and distillation > 0
    device = small.table.partition.item_at.device
    forked = [device] if device.type == "cuda" else []
    was_training = small.training
    with (
        torch.random.fork_rng(devices=forked),
        in_eval_mode(teacher),
        shown(progress) as show,
        in_float(small) as as_kept,
        with_dense_gradients(small),
        without_dropout(small) if teaches else nullcontext(),
    ):
        torch.manual_seed(seed)
        work = _Recovery(small, original, histories, float(distillation), valid_data, as_kept)
        try:
            work.run(epochs, batch_size, learning_rate, seed, show)
        finally:
            work.keep_best()
            small.zero_grad(set_to_none=True)
            small.train(was_training)
    return work.result


class _Recovery:
    def __init__(
        self,
        small: CompressedRecommender,
        original: Original | None,
        histories: Histories,
        distillation: float,
        valid_data: Any,
        as_kept: Callable[[], CompressedRecommender],
    ) -> None:
        self.small, self.original = small, original
        self.histories, self.valid_data, self.as_kept = histories, valid_data, as_kept
        self.teacher: Teacher | None = None
        if original is not None and distillation > 0:
            self.teacher = Teacher(small, original, distillation)
        self.result = Recovery()
        self.best = copy.deepcopy(small.state_dict())
        if valid_data is not None:
            self.result.metric = valid_metric(valid_data)
            if original is not None:
                self.result.original = evaluate(original.model, valid_data)
            self.result.start = self.measure()
            self.best_score = self.result.start[self.result.metric]

    def run(
        self, epochs: int, batch_size: int, learning_rate: float, seed: int, show: Show
    ) -> None:
        """Train for some epochs; `result` and `best` are up to date after each."""
        optimizer = build_optimizer(self.small, "adam", learning_rate, weight_decay=0.0)
        average = WeightAverage(self.small.parameters())
        generator = torch.Generator().manual_seed(seed)
        batches = _Batches(self.histories, batch_size, self.small.reading.one_state)
        if self.small.table.dtype == torch.bfloat16:
            self.check_layers(next(batches.shuffled(torch.Generator().manual_seed(seed))))
        n_steps = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: _rate_at((i + 1) / n_steps)
        )
        show.begin(epochs, len(batches), self.result)
        for epoch in range(epochs):
            self.small.train()
            total = 0.0
            for items, targets in batches.shuffled(generator):
                loss = self.loss(items, targets)
                if not torch.isfinite(loss):
                    raise CompressionError(
                        f"Expected `learning_rate` to let the loss fall, but with {learning_rate} "
                        f"it became {loss.item()} in epoch {epoch + 1}; use a smaller one."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update()
                schedule.step()
                total += loss.item()
                show.step(loss.item())
            if not all(torch.isfinite(p).all() for p in self.small.parameters()):
                raise CompressionError(
                    f"Expected `learning_rate` to let the loss fall, but with {learning_rate} "
                    f"weights became NaN or inf in epoch {epoch + 1}; use a smaller one."
                )
            self.result.losses.append(total / len(batches))
            with average.in_place():
                self.judge(epoch + 1)
            show.epoch(epoch + 1, self.result)

    @torch.no_grad()
    def check_layers(self, batch: tuple[Tensor, Tensor]) -> None:
        """Raise a CompressionError where RecBole's layers mix types with another than float32."""
        try:
            self.loss(*batch)
        except RuntimeError as error:
            raise CompressionError(
                f"Expected `small` to be in float32 or float64, but got {self.small.table.dtype}, "
                f"in which the layers of {self.small.record.host.__name__} do not run; use "
                "small.float()."
            ) from error

    def measure(self) -> dict[str, float]:
        """Validation metrics of the model as it will be, in int8 if it was."""
        return evaluate(self.as_kept(), self.valid_data)

    def judge(self, epoch: int) -> None:
        """Evaluate, and remember the weights if they are the best so far, or if nothing tells."""
        result = self.result
        if self.valid_data is not None:
            result.epochs.append(self.measure())
            score = result.epochs[-1][result.metric]
            if not score > self.best_score:
                return
            self.best_score = score
        result.kept = epoch
        self.best = copy.deepcopy(self.small.state_dict())

    def keep_best(self) -> None:
        """Give the model the weights that were remembered."""
        self.small.load_state_dict(self.best)

    def loss(self, items: Tensor, targets: Tensor) -> Tensor:
        """Training loss of windows `[B, L]` and the next item at each position `[B, L]`; or, for
        models that read one position, of prefixes `[B, L]` and their targets `[B]`, `[]`."""
        small, device = self.small, self.small.table.partition.item_at.device
        items, targets = items.to(device), targets.to(device)
        hidden = _read(small.reading, items, targets)
        target = targets[targets != PADDING]
        if self.teacher is None:
            loss = small.position_loss(hidden, target)
        else:
            with torch.no_grad():
                wanted = _read(self.teacher.original.reading, items, targets)
            loss = self.teacher.loss(hidden, wanted, target)
        return loss if small.record.penalty is None else loss + small.record.penalty(small.backbone)


def _read(reading: Reading, items: Tensor, targets: Tensor) -> Tensor:
    """Hidden states that have targets, `[B, L], [B, L] or [B] -> [N, d]`."""
    if targets.ndim == 1:
        return reading.last(items, (items != PADDING).sum(1))
    return reading.everywhere(items)[targets != PADDING]


def _rate_at(progress: float) -> float:
    """Share of the learning rate after a share of all steps: up evenly, then down evenly."""
    return min(progress / _WARM_UP, 1 - (1 - _LAST_RATE) * progress)


class _Batches:
    """Windows with about as many targets a step as asked for, without columns of padding; prefixes
    for models that have one state for a history."""

    def __init__(self, histories: Histories, batch_size: int, prefixes: bool) -> None:
        self.items, self.targets = histories.items, histories.required_targets()
        if prefixes:
            self.items, self.targets = histories.prefixes()
        self.prefixes = prefixes
        n_targets = int((self.targets != PADDING).sum())
        self.size = max(1, round(batch_size * len(self.items) / n_targets))

    def __len__(self) -> int:
        return -(-len(self.items) // self.size)

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.items), generator=generator).split(self.size):
            items, targets = self.items[rows], self.targets[rows]
            if not self.prefixes:
                longest = int((items != PADDING).sum(1).max())
                items, targets = items[:, :longest], targets[:, :longest]
            yield items, targets


def _check_pair(small: CompressedRecommender, original: Original) -> None:
    same = small.record is original.record and small.table.dim == original.dim
    if not same or small.n_items != original.n_items:
        raise CompressionError(
            f"Expected `teacher` to be the original of `small` ({small.record.host.__name__}, "
            f"{small.n_items} items, d {small.table.dim}), but got "
            f"{type(original.model).__name__}, {original.n_items} items, d {original.dim}."
        )
    if original.reads_last_column != small.reads_last_column:
        raise CompressionError(
            "Expected `teacher` to read histories as `small` does, but one reads the last column "
            "of a padded batch and the other the last item; compress this teacher."
        )


def _check_numbers(
    epochs: object, batch_size: object, rate: object, distillation: object, seed: object
) -> None:
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise CompressionError(f"Expected `seed` to be a whole number from 0, but got {seed!r}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not is_whole(value) or value < 1:
            raise CompressionError(
                f"Expected `{name}` to be a whole number, 1 or more, but got {value!r}."
            )
    if not is_number(rate) or not 0 < rate <= _HIGHEST_RATE:
        raise CompressionError(
            f"Expected `learning_rate` to be above 0 and at most {_HIGHEST_RATE:g}, but got "
            f"{rate!r}."
        )
    if not is_number(distillation) or not 0 <= distillation <= 1:
        raise CompressionError(
            f"Expected `distillation` to be a share from 0 to 1, but got {distillation!r}."
        )
