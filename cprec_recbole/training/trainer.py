"""RecBole's trainer for the compressed models: on one process or several, and to be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_gpu_usage, set_color
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.files import write_whole
from cprec_recbole.host.checkpoint import read_checkpoint
from cprec_recbole.host.processes import alone
from cprec_recbole.optimizers import build_optimizer
from cprec_recbole.parallel import group
from cprec_recbole.parallel.reducer import GradientReducer, begin_alike, clip_gradients
from cprec_recbole.parallel.shards import gathered_state
from cprec_recbole.parallel.shares import STAND_IN
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.records import HIDDEN_AT
from cprec_recbole.saving.vocabulary import check_numbering
from cprec_recbole.training.collector import TopKCollector, look_up
from cprec_recbole.training.journal import Journal
from cprec_recbole.training.snapshot import Moment, restore, set_random_state, take


class CompressedTrainer(Trainer):
    """RecBole's trainer for the compressed models; RecBole finds it by their names.

    Evaluation takes memory for `eval_batch_size` users' lists instead of their scores of all items.
    On several processes, `train_batch_size` is that of all together: each takes its part of the
    batch that one process would read, and all take the step that one would.

    Attributes:
        journal: where the state is written after every epoch, for a run that can be resumed; or
            None.
        measured: figures of each epoch so far, by name, that a subclass keeps; part of the state.
    """

    model: Any
    device: Any
    config: Any
    optimizer: Any
    saved_model_file: str

    def __init__(self, config: Any, model: torch.nn.Module) -> None:
        super().__init__(config, model)
        self.eval_collector = TopKCollector(config)
        self.journal: Journal | None = None
        self.measured: dict[str, list[float]] = {}
        self.valid_data: Any = None
        self._resumed: Moment | None = None
        self._is_resumed = False
        parted = getattr(model, "sharded_parameters", list)  # whole on the process that holds them
        self._parted = list(parted())
        self._reducer: GradientReducer | None = None
        if not config["single_spec"]:
            self._reducer = GradientReducer(model.parameters(), self._parted)
            own = {id(parameter) for parameter in self._parted}
            begin_alike(t for t in (*model.parameters(), *model.buffers()) if id(t) not in own)

    def _build_optimizer(self, **options: Any) -> Optimizer:
        """The optimizer of RecBole's options, in its quickest form."""
        if options:
            return super()._build_optimizer(**options)
        decay = self.weight_decay or 0.0
        return build_optimizer(self.model, self.learner, self.learning_rate, decay)

    @property
    def is_parted(self) -> bool:
        """Whether every process holds other rows of the model."""
        return bool(self._parted)

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Callable[[int, float], Any] | None = None,
    ) -> tuple[float, Any]:
        """Train, as RecBole's; with a journal, from where it was interrupted."""
        self.valid_data = valid_data
        for name, data in (("train_data", train_data), ("valid_data", valid_data)):
            check_numbering(self.model, data, name)
        result = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        if self.journal is not None:
            moment = Moment(self.epochs, 0, 0.0, train_data.generator.get_state(), {}, ended=True)
            self.journal.write(take(self, moment))
        return result

    def resume(self, state: dict[str, Any], train_data: Any, valid_data: Any) -> bool:
        """Go back to where a journal was written; returns whether there is anything left to do.

        Args:
            state: what `Journal.read` gives.
            train_data: the loader that `fit` will be given.
            valid_data: the other one.
        """
        self.valid_data = valid_data
        self._resumed, self._is_resumed = restore(self, state, train_data), True
        self.start_epoch = self._resumed.epoch
        return not self._resumed.ended

    def put_back_random_state(self) -> None:
        """As it was when the last of the training was written down; for a test that follows."""
        if self._resumed is not None and self._resumed.random is not None:
            set_random_state(self._resumed.random, self.device)

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Interaction], Tensor] | None = None,
        show_progress: bool = False,
    ) -> float:
        """Train for an epoch, or what is left of it; returns the sum of the steps' losses.

        The loss is looked at once an epoch, so that a GPU is not waited for at every step.

        Raises:
            ValueError: the loss is not a number, as RecBole says it.
        """
        self.model.train()
        scaler = GradScaler(self.device.type, enabled=self.enable_scaler)
        begin = self._begin(train_data, epoch_idx, scaler)
        total = torch.tensor(begin.loss, dtype=torch.float64, device=self.device)
        batches = iter(train_data)
        for _ in range(begin.step):
            next(batches)  # trained on before the interruption
        if begin.random is not None:
            set_random_state(begin.random, self.device)
        bar = self._shown(batches, epoch_idx, begin.step, len(train_data), show_progress)
        for step, batch in enumerate(bar, begin.step + 1):
            total += self._step(batch, loss_func or self.model.calculate_loss, scaler)
            if self.gpu_available and show_progress:
                usage = get_gpu_usage(self.device)
                bar.set_postfix_str(set_color("GPU RAM: " + usage, "yellow"))
            if self.journal is not None and self.journal.is_due(step) and step < len(train_data):
                self._check_nan(total)
                moment = begin.later(step, float(total), scaler.state_dict())
                self.journal.write(take(self, moment))
        group.total(total)
        self._check_nan(total)
        return float(total)

    def _begin(self, train_data: Any, epoch: int, scaler: GradScaler) -> Moment:
        """Where in an epoch to begin: at its first step, which is written down, or further on."""
        if self._resumed is not None:
            begin, self._resumed = self._resumed, None
            train_data.generator.set_state(begin.generator)
            scaler.load_state_dict(begin.scaler)
            return begin
        begin = Moment(epoch, 0, 0.0, train_data.generator.get_state(), scaler.state_dict())
        if self.journal is not None:
            self.journal.write(take(self, begin))
        return begin

    def _step(
        self, batch: Interaction, loss_func: Callable[[Interaction], Tensor], scaler: GradScaler
    ) -> Tensor:
        """One step of the optimizer; returns this process's part of the loss, `[]`."""
        self.optimizer.zero_grad()
        weight = self._weight(batch)
        with torch.autocast(device_type=self.device.type, enabled=self.enable_amp):
            loss = loss_func(batch.to(self.device))
        if self._reducer is not None:
            loss = loss * weight
        scaler.scale(loss).backward()
        if self._reducer is not None:
            self._reducer.reduce()
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)  # RecBole clips what is scaled
            clip_gradients(
                list(self.model.parameters()), **self.clip_grad_norm, parted=self._parted
            )
        scaler.step(self.optimizer)
        scaler.update()
        return loss.detach()

    def _weight(self, batch: Interaction) -> float:
        """This process's part of the targets of a batch: its mean loss counts for so much."""
        if self._reducer is None:
            return 1.0
        mine = 0 if getattr(batch, STAND_IN, False) else n_targets(batch)
        return mine / max(1, int(group.total(torch.tensor(mine, dtype=torch.int64))))

    def _shown(
        self, batches: Iterable, epoch: int, done: int, n_steps: int, show_progress: bool
    ) -> Any:
        """Batches with RecBole's progress bar, if it is wanted."""
        if not show_progress:
            return batches
        title = set_color(f"Train {epoch:>5}", "pink")
        return tqdm(batches, total=n_steps, initial=done, ncols=100, desc=title)

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write RecBole's checkpoint, so that a crash leaves the one before or the new one."""
        path = kwargs.get("saved_model_file", self.saved_model_file)
        state = {
            "config": alone(self.config),
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": self.best_valid_score,
            "state_dict": gathered_state(self.model),
            "other_parameter": self.model.other_parameter(),
            # no process has all of what it keeps of rows that are spread
            "optimizer": {} if self.is_parted else self.optimizer.state_dict(),
        }
        if group.is_first():
            write_whole(Path(path), lambda file: torch.save(state, file, pickle_protocol=4))
            if verbose:
                self.logger.info(set_color("Saving current", "blue") + f": {path}")
        group.wait()  # the others may be about to read the file

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's metrics, of the rows of all processes.

        Raises:
            CompressionError: data that numbers its items otherwise than the model does.
        """
        if eval_data is not self.valid_data:  # which `fit` has compared
            check_numbering(self.model, eval_data, "eval_data")
        if load_best_model and self._is_resumed and eval_data:
            # what lies in the folder of an earlier run is read without running it
            found = read_checkpoint(model_file or self.saved_model_file)
            self.model.load_state_dict(found.state)
            load_best_model = False
        if self.config["shard_tails"] and self._reducer is not None:
            rows = group.share(eval_data.sample_size, group.rank(), group.size())
            self.eval_collector.n_rows = len(rows)
        return super().evaluate(eval_data, load_best_model, model_file, show_progress)

    def _full_sort_batch_eval(self, batched_data: tuple) -> tuple:
        interaction, history, positive_u, positive_i = batched_data
        if not isinstance(self.model, CompressedRecommender) or history is not None:
            return super()._full_sort_batch_eval(batched_data)
        found = look_up(self.model, interaction.to(self.device))
        return interaction, found, positive_u, positive_i


def n_targets(batch: Interaction) -> int:
    """How many predictions a training batch asks for."""
    if NEXT_ITEMS in batch:
        return int((batch[NEXT_ITEMS] != 0).sum())
    if HIDDEN_AT in batch:
        return int((batch[HIDDEN_AT] > 0).sum())
    return len(batch)
