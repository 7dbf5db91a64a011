"""recover(): a short fine-tuning that gives a compressed model the original's quality back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cprec_recbole.compression.distillation import Teacher
from cprec_recbole.compression.histories import Histories, histories_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.quantize import in_float, quantized
from cprec_recbole.compression.warm_start import fill
from cprec_recbole.config import CompressionError, check_number, check_whole
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.eval_mode import in_eval_mode, with_dense_gradients, without_dropout
from cprec_recbole.models.recommender import CompressedRecommender, copied
from cprec_recbole.models.spec import Encoder
from cprec_recbole.partition import PADDING
from cprec_recbole.results import Recovery
from cprec_recbole.threads import threads_for
from cprec_recbole.training.evaluation import check_validation_data, evaluate, valid_metric
from cprec_recbole.training.optimizers import build_optimizer

# what was tried: docs/compressing.md, and benchmarks/results/recovery-rates.md for the rates
_BATCH_SIZE = 128
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
    target's own block. Adam, its rate rising over the first twentieth of the steps, then falling
    evenly. What counts is the average of the weights over the latest steps.
    With validation data the best epoch's average is kept, which may be the start.
    A quantized model is trained in float, with the rounding of int4 in each step, measured as it
    will be kept, and quantized again afterwards.

    Args:
        small: what `compress()` made; it is changed.
        teacher: the original that it was made from; None to fine-tune on the data alone, as after
            `add_items`.
        data: training data: RecBole's dataset or data loader, or lists of item ids.
        epochs: passes over the data.
        valid_data: RecBole's validation data, to report quality before and after each epoch.
        distillation: weight of the original's predictions, from 0 (none) to 1 (nothing else).
        learning_rate: the highest, after the rise.
        batch_size: predictions a step; fewer than in training, for a recovery has few epochs.
        seed: of dropout and the order of batches. The process's random state is left as it was.
        progress: show a bar; a line an epoch where the output is no terminal.

    Returns:
        Metrics before and after each epoch, and which epoch was kept.

    Raises:
        CompressionError: models that do not belong together, data of another catalogue, options out
            of range, a loss that is no number. What was reached is kept, as it is on Ctrl-C.
    """
    if not isinstance(small, CompressedRecommender):
        raise CompressionError(
            f"Expected `small` to be a compressed model, but got {type(small).__name__}."
        )
    if small.table.dtype == torch.float16:
        raise CompressionError(
            "Expected `small` to be in float32, float64 or bfloat16, but got float16, in which "
            "Adam's steps are lost; use small.float()."
        )
    original = None if teacher is None else Original.of(teacher)
    if original is not None and _about(small) != _about(original):
        raise CompressionError(
            f"Expected `teacher` to be the original of `small` ({_about(small)}), but got "
            f"{_about(original)}."
        )
    check_whole("epochs", epochs)
    check_whole("batch_size", batch_size)
    check_whole("seed", seed, 0)
    words = f"above 0 and at most {_HIGHEST_RATE:g}"
    check_number("learning_rate", learning_rate, words, sys.float_info.min, _HIGHEST_RATE)
    check_number("distillation", distillation, "a share from 0 to 1", 0, 1)
    if valid_data is not None:
        check_validation_data(valid_data)
    for given, name in ((data, "data"), (valid_data, "valid_data")):
        for model in (small, teacher):
            check_numbering(model, given, name)
    histories = histories_of(data, small.n_items, small.max_seq_length)
    dtype = small.quantized
    learner = in_float(small) if dtype else small
    as_teacher = None
    if original is not None and distillation > 0:
        as_teacher = Teacher(learner, original, float(distillation))
    device = small.table.partition.item_at.device
    was_training = small.training
    result = Recovery()
    say = tqdm.write if progress else lambda line: None

    def measured() -> dict[str, float]:
        as_kept = quantized(copied(learner), dtype, small) if dtype else learner
        return evaluate(as_kept, valid_data)

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        in_eval_mode(teacher),
        threads_for(small.n_items, small.table.dim),
        with_dense_gradients(learner),
        # what the original says of every item keeps the model from learning its few labels by
        # heart, and dropout would hide from a small model what it is to repeat
        nullcontext() if as_teacher is None else without_dropout(learner),
    ):
        torch.manual_seed(seed)
        best = copy.deepcopy(learner.state_dict())
        if valid_data is not None:
            result.metric = valid_metric(valid_data)
            if original is not None:
                result.original = evaluate(original.model, valid_data)
            result.start = measured()
            say(f"recover: {result.scores_before()}")
        rounding = small.compression.rounding if dtype in (None, "int8") else dtype
        options = (epochs, batch_size, learning_rate, seed, progress, rounding)
        try:
            with closing(_train(learner, as_teacher, histories, *options)) as mean_losses:
                for epoch, mean_loss in enumerate(mean_losses, start=1):
                    result.losses.append(mean_loss)
                    if valid_data is not None:
                        result.epochs.append(measured())
                    if result.last_is_best():
                        result.kept, best = epoch, copy.deepcopy(learner.state_dict())
                    say(f"recover: {result.last_epoch()}")
        finally:
            learner.load_state_dict(best)
            learner.zero_grad(set_to_none=True)
            learner.train(was_training)
            if dtype and result.kept:
                kept = quantized(learner, dtype, small)
                small.load_state_dict(kept.state_dict())
                small.matrix_scales = kept.matrix_scales
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
    rounding: str | None,
) -> Generator[float, None, None]:
    """Train, giving the mean loss of each epoch while the parameters are their averages."""
    # a model with one state for a history is asked for each target by itself
    items, targets = histories.prefixes() if small.encoder.has_one_state else histories
    n_targets = int((targets != PADDING).sum())
    size = max(1, round(batch_size * len(items) / n_targets))
    n_batches = -(-len(items) // size)
    if small.table.dtype == torch.bfloat16:
        first = next(_batches(items, targets, size, torch.Generator().manual_seed(seed)))
        try:
            with torch.no_grad():
                _loss(small, teacher, *first)
        except RuntimeError as error:
            raise CompressionError(
                f"Expected `small` to be in float32 or float64, but got {small.table.dtype}, in "
                f"which the layers of {small.spec.name} do not run; use small.float()."
            ) from error
    optimizer = build_optimizer(small, "adam", learning_rate, weight_decay=0.0)
    n_steps, step = epochs * n_batches, 0

    def rate_after(i: int) -> float:  # as a share, evenly up, then evenly down
        progress = (i + 1) / n_steps
        return min(progress / _WARM_UP, 1 - (1 - _LAST_RATE) * progress)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_after)
    parameters = [parameter.detach() for parameter in small.parameters()]
    # in half precision the later, smaller shares would round to nothing, as in AveragedModel
    types = [torch.promote_types(each.dtype, torch.float32) for each in parameters]
    averages = [each.to(kind, copy=True) for each, kind in zip(parameters, types)]
    generator = torch.Generator().manual_seed(seed)
    # `disable=None` shows the bar on a terminal alone
    with tqdm(total=n_steps, desc="recover", disable=None if progress else True) as bar:
        for epoch in range(1, epochs + 1):
            small.train()
            total = 0.0
            for batch in _batches(items, targets, size, generator):
                optimizer.zero_grad()
                with small.rounded(rounding):
                    loss = _loss(small, teacher, *batch)
                    if not torch.isfinite(loss):
                        raise _diverged(f"it became {loss.item()}", learning_rate, epoch)
                    loss.backward()
                optimizer.step()
                step += 1
                # Polynomial-decay averaging (Shamir and Zhang, Stochastic gradient descent for
                # non-smooth optimization, ICML 2013, section 4): it needs no horizon
                for average, parameter in zip(averages, parameters):
                    average.lerp_(parameter.to(average.dtype), (_ETA + 1) / (_ETA + step))
                schedule.step()
                total += loss.item()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()
            if not all(torch.isfinite(parameter).all() for parameter in parameters):
                raise _diverged("weights became NaN or inf", learning_rate, epoch)
            latest = [parameter.clone() for parameter in parameters]
            fill(parameters, averages)
            yield total / n_batches
            fill(parameters, latest)


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
    """Training loss of windows `[B, L]` and the next items `[B, L]`, or of prefixes `[B, L]` and
    their targets `[B]`, `[]`."""
    device = small.table.partition.item_at.device
    items, targets = items.to(device), targets.to(device)
    hidden, target = _hidden(small.encoder, items, targets)
    if teacher is None:
        loss = small.position_loss(hidden, target)
    else:
        with torch.no_grad():
            taught, _ = _hidden(teacher.original.encoder, items, targets)
        loss = teacher.loss(hidden, taught, target)
    return loss if small.spec.penalty is None else loss + small.spec.penalty(small.inner)


def _hidden(encoder: Encoder, items: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that have targets, and these, `[B, L], [B, L] or [B] -> [N, d], [N]`."""
    if targets.ndim == 1:
        return encoder.last_state(items, (items != PADDING).sum(1)), targets
    hidden, targets = encoder.at_targets(items, targets)
    return hidden[targets != PADDING], targets[targets != PADDING]


def _diverged(what_came: str, learning_rate: float, epoch: int) -> CompressionError:
    return CompressionError(
        f"Expected `learning_rate` to let the loss fall, but with {learning_rate} {what_came} in "
        f"epoch {epoch}; use a smaller one."
    )


def _about(model: CompressedRecommender | Original) -> str:
    dim = model.dim if isinstance(model, Original) else model.table.dim
    reads = "last column of a batch" if model.reads_last_column else "last item"
    return f"{model.spec.name}, {model.n_items} items, d {dim}, reads the {reads}"
