"""RecBole's trainer for the compressed models: on one process or several, and to be resumed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_gpu_usage, set_color
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.embedding import SPARSE_ROWS
from cprec_recbole.files import write_whole
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.recommender import HIDDEN_AT, CompressedRecommender
from cprec_recbole.parallel import group
from cprec_recbole.training.evaluation import TopKCollector
from cprec_recbole.training.optimizers import build_optimizer, clip_gradients, sparse_parameters
from cprec_recbole.training.state import Journal, Progress, restore, set_random_state, state_of


class CompressedTrainer(Trainer):
    """RecBole's trainer for the compressed models; RecBole finds it by their names.

    Evaluation takes memory for `eval_batch_size` users' lists instead of their scores of all items.
    On several processes, `train_batch_size` is that of all together: each takes its part of the
    batch that one process would read, and all take the step that one would.

    Attributes:
        journal: where the state is written as every epoch begins, for a run that can be resumed.
        measured: lists for `epoch_seconds` and `valid_scores`, where these are asked for; they are
            part of the state.
    """

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__(config, model)
        self.eval_collector = TopKCollector(config)
        self.journal: Journal | None = None
        self.measured: dict[str, list[float]] = {}
        self.valid_data: Any = None
        self._resumed: Progress | None = None
        self._is_resumed = False
        own = getattr(model, "compression", None)  # a study trains RecBole's own models, too
        self._rounding = own and own.rounding
        self._is_alone = bool(config["single_spec"])
        self._loss: Any = model.calculate_loss if self._is_alone else _distributed(model)

    def _build_optimizer(self) -> Optimizer:
        """The optimizer of RecBole's options, in its quickest form."""
        decay = self.weight_decay or 0.0
        own = getattr(self.model, "compression", None)  # a study trains RecBole's own models, too
        is_sampled = own is not None and own.negatives and self.model.n_items > SPARSE_ROWS
        if is_sampled and self.learner.lower() == "adam":
            self.logger.warning(
                "`learner: adam` moves every item's row in every step. With `negatives` "
                "`sparse_adam` is faster and steadier (docs/training.md)."
            )
        return build_optimizer(self.model, self.learner, self.learning_rate, decay)

    def fit(
        self, train_data: Any, valid_data: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[float, Any]:
        """Train, as RecBole's; after `resume`, what is left to do."""
        self.valid_data = valid_data
        for name, data in (("train_data", train_data), ("valid_data", valid_data)):
            check_numbering(self.model, data, name)
        if self._resumed is not None and self._resumed.ended:
            self.eval_collector.data_collect(train_data)  # as RecBole's begins
            set_random_state(self._resumed.random, self.device)  # of which a test may draw
            return self.best_valid_score, self.best_valid_result
        result = super().fit(train_data, valid_data, *args, **kwargs)
        self._write(Progress(self.epochs, 0, 0.0, train_data.generator.get_state(), {}, ended=True))
        return result

    def resume(self, state: dict[str, Any], valid_data: Any) -> bool:
        """Go back to a state that `Journal.read` gave, for a `fit` with these validation data;
        returns whether there is anything left to do."""
        self.valid_data = valid_data
        self._resumed, self._is_resumed = restore(self, state), True
        self.start_epoch = self._resumed.epoch
        return not self._resumed.ended

    def _train_epoch(self, train_data: Any, epoch_idx: int, show_progress: bool = False) -> float:
        """Train for an epoch, or what is left of it; returns the sum of the steps' losses.

        It is looked at once an epoch, so that a GPU is not waited for at every step; RecBole's
        ValueError where it is not a number.
        """
        self.model.train()
        scaler = GradScaler(self.device.type, enabled=self.enable_scaler)
        begin, began = self._begin(train_data, epoch_idx, scaler), perf_counter()
        every = self.journal.every if self.journal is not None else 0
        total = torch.tensor(begin.loss, dtype=torch.float64, device=self.device)
        batches = iter(train_data)
        for _ in range(begin.step):
            next(batches)  # trained on before the interruption
        if begin.random:
            set_random_state(begin.random, self.device)
        look = {"ncols": 100, "disable": not show_progress, "initial": begin.step}
        title = set_color(f"Train {epoch_idx:>5}", "pink")
        bar = tqdm(batches, title, len(train_data), **look)
        for step, batch in enumerate(bar, begin.step + 1):
            total += self._step(batch, scaler)
            if self.gpu_available and show_progress:
                usage = get_gpu_usage(self.device)
                bar.set_postfix_str(set_color("GPU RAM: " + usage, "yellow"))
            if every and step % every == 0 and step < len(train_data):
                self._check_nan(total)
                scale = scaler.state_dict()
                self._write(begin._replace(step=step, loss=float(total), scaler=scale))
        group.total(total)
        self._check_nan(total)
        loss = float(total)  # which waits for a GPU
        self.measured.get("epoch_seconds", []).append(perf_counter() - began)
        return loss

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        score, result = super()._valid_epoch(*args, **kwargs)
        self.measured.get("valid_scores", []).append(float(score))
        return score, result

    def _begin(self, train_data: Any, epoch: int, scaler: GradScaler) -> Progress:
        """Where in an epoch to begin: at its first step, which is written down, or further on."""
        if self._resumed is not None:
            begin, self._resumed = self._resumed, None
            train_data.generator.set_state(begin.generator)
            scaler.load_state_dict(begin.scaler)
            return begin
        begin = Progress(epoch, 0, 0.0, train_data.generator.get_state(), scaler.state_dict())
        self._write(begin)
        return begin

    def _write(self, progress: Progress) -> None:
        if self.journal is not None:
            self.journal.write(state_of(self, progress))

    def _step(self, batch: Interaction, scaler: GradScaler) -> Tensor:
        """One step of the optimizer; returns this process's part of the loss, `[]`."""
        self.optimizer.zero_grad()
        weight = self._weight(batch)
        with self._rounded():
            with torch.autocast(device_type=self.device.type, enabled=self.enable_amp):
                loss = self._loss(batch.to(self.device)) * weight
            # DistributedDataParallel takes the mean over processes where we need the sum
            scaler.scale(loss * group.size()).backward()
        if not self._is_alone:
            for parameter in sparse_parameters(self.model):
                _add_up_rows(parameter)
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)  # RecBole clips what is scaled
            clip_gradients(list(self.model.parameters()), **self.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        return loss.detach()

    def _weight(self, batch: Interaction) -> float:
        """This process's part of the targets of a batch: its mean loss counts for so much."""
        if self._is_alone:
            return 1.0
        mine = 0 if getattr(batch, group.STAND_IN, False) else n_targets(batch)
        return mine / max(1, int(group.total(torch.tensor(mine, dtype=torch.int64))))

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint, so that a crash leaves the one before or the new one."""
        path = Path(kwargs.get("saved_model_file") or self.saved_model_file)

        def write(file: Path) -> None:
            super(CompressedTrainer, self)._save_checkpoint(epoch, False, saved_model_file=file)

        if group.is_first():
            write_whole(path, write)
            if verbose:
                self.logger.info(set_color("Saving current", "blue") + f": {path}")
        else:
            write(path)  # which waits, and writes nothing
        group.wait()  # the others may be about to read the file

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's metrics, of the rows of all processes; a CompressionError for data that numbers
        its items otherwise than the model does."""
        if eval_data is not self.valid_data:  # which `fit` has compared
            check_numbering(self.model, eval_data, "eval_data")
        if load_best_model and eval_data and (self._is_resumed or self._rounding):
            # what lies in the folder of an earlier run is read without running it, and weights that
            # are rounded while they are evaluated are loaded before
            found = read_checkpoint(model_file or self.saved_model_file)
            self.model.load_state_dict(found.state)
            load_best_model = False
        with self._rounded():
            return super().evaluate(eval_data, load_best_model, model_file, show_progress)

    def _rounded(self) -> AbstractContextManager[None]:
        return self.model.rounded(self._rounding) if self._rounding else nullcontext()

    def _full_sort_batch_eval(self, batched_data: tuple) -> tuple:
        interaction, history, positive_u, positive_i = batched_data
        if not isinstance(self.model, CompressedRecommender) or history is not None:
            return super()._full_sort_batch_eval(batched_data)
        return interaction, self.model, positive_u, positive_i  # see TopKCollector


class _Loss(nn.Module):
    """A model whose `forward` is its training loss, as DistributedDataParallel needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Interaction) -> Tensor:
        return self.model.calculate_loss(batch)


def _distributed(model: nn.Module) -> nn.Module:
    """The loss of a model whose gradients become the mean over all processes."""
    loss = _Loss(model)
    sparse = {id(parameter) for parameter in sparse_parameters(model)}
    every = loss.named_parameters(remove_duplicate=False)  # a tied table has two names
    # it takes sparse gradients of nn.Embedding alone; ours are added up beside it
    ignored = [name for name, parameter in every if id(parameter) in sparse]
    ignored += [name for name, _ in loss.named_buffers(remove_duplicate=False)]  # all constant
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, ignored)
    return DistributedDataParallel(loss, find_unused_parameters=True)


def _add_up_rows(parameter: nn.Parameter) -> None:
    """Replace a sparse gradient by the mean over processes, which is sparse too."""
    if parameter.grad is not None:
        total = parameter.grad.coalesce()
        dist.all_reduce(total)
        parameter.grad = total.coalesce() / group.size()


def n_targets(batch: Interaction) -> int:
    """How many predictions a training batch asks for."""
    if NEXT_ITEMS in batch:
        return int((batch[NEXT_ITEMS] != 0).sum())
    if HIDDEN_AT in batch:
        return int((batch[HIDDEN_AT] > 0).sum())
    return len(batch)
