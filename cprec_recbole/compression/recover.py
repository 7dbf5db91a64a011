"""recover(): a short fine-tuning that gives a compressed model the original's quality back."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cprec_recbole.compression.distillation import Teacher
from cprec_recbole.compression.histories import Histories, histories_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.quantize import in_float
from cprec_recbole.compression.warm_start import fill
from cprec_recbole.config import CompressionError, check_whole, is_number, is_whole
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.eval_mode import in_eval_mode, with_dense_gradients, without_dropout
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.spec import Encoder
from cprec_recbole.partition import PADDING
from cprec_recbole.results import Recovery
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
_ETA = 8  # of the averaging: about the last ninth of the steps counts
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
    evenly. What counts is the average of the weights over the latest steps.
    With validation data the best epoch's average is kept, which may be the start.
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
    as_teacher = None
    if original is not None and distillation > 0:
        as_teacher = Teacher(small, original, float(distillation))
    device = small.table.partition.item_at.device
    was_training = small.training
    result = Recovery()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        in_eval_mode(teacher),
        in_float(small) as as_kept,
        with_dense_gradients(small),
        # What the original says of every item keeps the model from learning its few labels by
        # heart, and dropout would hide from a small model what it is to repeat (SASRec as above:
        # loss 5.868 without, 5.923 with 0.4 of it, 5.972 with all of it).
        nullcontext() if as_teacher is None else without_dropout(small),
    ):
        torch.manual_seed(seed)
        best = copy.deepcopy(small.state_dict())
        if valid_data is not None:
            result.metric = valid_metric(valid_data)
            if original is not None:
                result.original = evaluate(original.model, valid_data)
            result.start = evaluate(as_kept(), valid_data)
            if progress:
                tqdm.write(f"recover: {result.scores_before()}")
        options = (epochs, batch_size, learning_rate, seed, progress)
        try:
            with closing(_train(small, as_teacher, histories, *options)) as mean_losses:
                for epoch, mean_loss in enumerate(mean_losses, start=1):
                    result.losses.append(mean_loss)
                    if valid_data is not None:
                        result.epochs.append(evaluate(as_kept(), valid_data))
                    if result.last_is_best():
                        result.kept, best = epoch, copy.deepcopy(small.state_dict())
                    if progress:
                        tqdm.write(f"recover: {result.last_epoch()}")
        finally:
            small.load_state_dict(best)
            small.zero_grad(set_to_none=True)
            small.train(was_training)
    return result


def _train(
    small: CompressedRecommender,
    teacher: Teacher | None,
    histories: Histories,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> Generator[float, None, None]:
    """Train for some epochs. Gives the mean loss of each, and meanwhile the parameters are the
    averages of what they were after the steps."""
    # a model with one state for a history is asked for each target by itself
    items, targets = histories.prefixes() if small.encoder.has_one_state else histories
    n_targets = int((targets != PADDING).sum())
    size = max(1, round(batch_size * len(items) / n_targets))
    n_batches = -(-len(items) // size)
    if small.table.dtype == torch.bfloat16:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                _loss(small, teacher, *next(_batches(items, targets, size, generator)))
        except RuntimeError as error:
            raise CompressionError(
                f"Expected `small` to be in float32 or float64, but got {small.table.dtype}, in "
                f"which the layers of {small.spec.name} do not run; use small.float()."
            ) from error
    optimizer = build_optimizer(small, "adam", learning_rate, weight_decay=0.0)
    n_steps = epochs * n_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate_at((i + 1) / n_steps))
    parameters = list(small.parameters())
    averages, step = averages_of(parameters), 0
    generator = torch.Generator().manual_seed(seed)
    # `disable=None` shows the bar on a terminal alone
    with tqdm(total=n_steps, desc="recover", disable=None if progress else True) as bar:
        for epoch in range(1, epochs + 1):
            small.train()
            total = 0.0
            for batch in _batches(items, targets, size, generator):
                loss = _loss(small, teacher, *batch)
                if not torch.isfinite(loss):
                    raise _diverged(f"it became {loss.item()}", learning_rate, epoch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                take_in(parameters, averages, step)
                schedule.step()
                total += loss.item()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()
            if not all(torch.isfinite(parameter).all() for parameter in parameters):
                raise _diverged("weights became NaN or inf", learning_rate, epoch)
            latest = [parameter.detach().clone() for parameter in parameters]
            fill(parameters, averages)
            yield total / n_batches
            fill(parameters, latest)


def averages_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters to average them in: in single precision at least, since in half
    precision the later, smaller shares would round to nothing, as in torch's AveragedModel."""
    types = [torch.promote_types(each.dtype, torch.float32) for each in parameters]
    return [each.detach().to(kind, copy=True) for each, kind in zip(parameters, types)]


@torch.no_grad()
def take_in(parameters: Sequence[Tensor], averages: Sequence[Tensor], step: int) -> None:
    """Take the parameters after a step, counted from 1, into their averages along the training.

    Polynomial-decay averaging (Shamir and Zhang, Stochastic gradient descent for non-smooth
    optimization, ICML 2013, section 4): it follows a training of any length, with no horizon to
    set.
    """
    weight = (_ETA + 1) / (_ETA + step)
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter.to(average.dtype), weight)


def _batches(
    items: Tensor, targets: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches: windows without columns of padding, or prefixes."""
    for rows in torch.randperm(len(items), generator=generator).split(size):
        batch, wanted = items[rows], targets[rows]
        if wanted.ndim == 2:
            longest = int((batch != PADDING).sum(1).max())
            batch, wanted = batch[:, :longest], wanted[:, :longest]
        yield batch, wanted


def _loss(
    small: CompressedRecommender, teacher: Teacher | None, items: Tensor, targets: Tensor
) -> Tensor:
    """Training loss of windows `[B, L]` and the next item at each position `[B, L]`; or, for models
    that read one position, of prefixes `[B, L]` and their targets `[B]`, `[]`."""
    device = small.table.partition.item_at.device
    items, targets = items.to(device), targets.to(device)
    hidden, target = _hidden(small.encoder, items, targets), targets[targets != PADDING]
    if teacher is None:
        loss = small.position_loss(hidden, target)
    else:
        with torch.no_grad():
            taught = _hidden(teacher.original.encoder, items, targets)
        loss = teacher.loss(hidden, taught, target)
    return loss if small.spec.penalty is None else loss + small.spec.penalty(small.inner)


def _hidden(encoder: Encoder, items: Tensor, targets: Tensor) -> Tensor:
    """Hidden states that have targets, `[B, L], [B, L] or [B] -> [N, d]`."""
    if targets.ndim == 1:
        return encoder.last_state(items, (items != PADDING).sum(1))
    return encoder.every_position(items)[targets != PADDING]


def _diverged(what_came: str, learning_rate: float, epoch: int) -> CompressionError:
    return CompressionError(
        f"Expected `learning_rate` to let the loss fall, but with {learning_rate} {what_came} in "
        f"epoch {epoch}; use a smaller one."
    )


def _rate_at(progress: float) -> float:
    """Share of the learning rate after a share of all steps: up evenly, then down evenly."""
    return min(progress / _WARM_UP, 1 - (1 - _LAST_RATE) * progress)


def _check_pair(small: CompressedRecommender, original: Original) -> None:
    same = small.spec is original.spec and small.table.dim == original.dim
    if not same or small.n_items != original.n_items:
        raise CompressionError(
            f"Expected `teacher` to be the original of `small` ({small.spec.name}, "
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
    check_whole("epochs", epochs)
    check_whole("batch_size", batch_size)
    rates, shares = f"above 0 and at most {_HIGHEST_RATE:g}", "a share from 0 to 1"
    for name, value, expected, is_right in (
        ("seed", seed, "a whole number from 0", is_whole(seed) and 0 <= seed < 2**63),
        ("learning_rate", rate, rates, is_number(rate) and 0 < rate <= _HIGHEST_RATE),
        ("distillation", distillation, shares, is_number(distillation) and 0 <= distillation <= 1),
    ):
        if not is_right:
            raise CompressionError(f"Expected `{name}` to be {expected}, but got {value!r}.")
