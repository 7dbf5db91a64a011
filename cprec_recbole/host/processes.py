"""What it takes to run RecBole 1.2.1 on several processes, with GPUs or without: it asks for NCCL
and a GPU each, counts padded evaluation rows, weighs metrics by the fields of a batch, and lets
every process write. One process alone does what it did."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, RandomSampler

from cprec_recbole.config import CompressionError
from cprec_recbole.host.patching import is_ours, replaces
from cprec_recbole.parallel import group
from cprec_recbole.parallel.group import Place

# what the collector keeps of evaluation batches, a row for each user or interaction
_COLLECTED = ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label")
_OF_A_GROUP = {"local_rank", "world_size", "nproc", "ip", "port", "offset"}


@replaces("recbole.config.Config._init_device")
def _init_device(original: Callable, self: Any) -> None:
    final, place = self.final_config_dict, group.place
    if place is None and "local_rank" in final:  # RecBole's own `run` says it in options
        local_rank, size, nproc = final["local_rank"], final["world_size"], final["nproc"]
        meeting = f"tcp://{final['ip']}:{final['port']}"
        place = Place(local_rank + final["offset"], size, local_rank, nproc, meeting)
    if place is None:
        original(self)
        return
    gpus = _gpus(final, "gpu_id" in self.external_config_dict, place)
    group.join(place, gpus=bool(gpus))
    device = torch.device("cuda", gpus[place.local_rank]) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    # RecBole asks `local_rank` who writes, and adds it to the seed
    final.update(single_spec=False, device=device, local_rank=place.rank)
    final.update(world_size=place.size, nproc=place.local_size)
    if place.rank:
        final.update(state="error", show_progress=False, verbose=False, log_wandb=False)
        final.update(save_dataset=False, save_dataloaders=False)


def _gpus(options: dict[str, Any], given: bool, place: Place) -> list[int]:
    """The number of each local process's GPU, by `gpu_id` where it is `given`; [] for the CPU."""
    gpu_id = options["gpu_id"]
    listed = ",".join(map(str, gpu_id)) if isinstance(gpu_id, tuple | list) else str(gpu_id)
    names = [name for name in listed.split(",") if name.strip()]
    if not names or options.get("use_gpu") is False or not torch.cuda.is_available():
        return []
    if given:
        if len(names) < place.local_size:
            raise CompressionError(
                f"Expected `gpu_id` to name a GPU for each of {place.local_size} processes, but "
                f"got {listed!r}; name as many, or '' to work on the CPU."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)  # as RecBole does
    found = torch.cuda.device_count()
    if found >= place.local_size:
        return list(range(place.local_size))
    if place.local_rank == 0:
        text = "%d processes find %d GPUs, and work on the CPU."
        logging.getLogger().warning(text, place.local_size, found)
    return []


@replaces("recbole.data.dataloader.abstract_dataloader.AbstractDataLoader.__init__")
def _init_loader(
    original: Callable, self: Any, config: Any, dataset: Any, sampler: Any, shuffle: bool = False
) -> None:
    original(self, config, dataset, sampler, shuffle)
    if config["single_spec"]:
        return
    number, parts = group.rank(), group.size()
    if isinstance(self, FullSortEvalDataLoader | NegSampleEvalDataLoader):
        order: Any = group.part_of(self.sample_size, number, parts)
    elif is_ours(config):
        self._init_batch_size_and_step()  # RecBole has divided the batch by the processes
        order = range(self.sample_size)
        if shuffle:
            order = RandomSampler(order, generator=self.generator)
        self.collate_fn = partial(group.collate_part, self.collate_fn, number, parts)
    else:
        return
    # which a DataLoader does not let one set
    self.__dict__["batch_sampler"] = BatchSampler(order, self.step, drop_last=False)


@replaces("recbole.trainer.trainer.AbstractTrainer.__init__")
def _init_abstract_trainer(original: Callable, self: Any, config: Any, model: nn.Module) -> None:
    if config["single_spec"]:
        original(self, config, model)
        return
    self.config, self.model = config, model
    if is_ours(config):
        return  # CompressedTrainer adds the gradients up itself
    gpus = None
    if config["device"].type == "cuda":
        gpus = [config["device"].index]
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    self.distributed_model = DistributedDataParallel(self.model, device_ids=gpus)


@replaces("recbole.trainer.trainer.Trainer.__init__")
def _init_trainer(original: Callable, self: Any, config: Any, model: nn.Module) -> None:
    original(self, config, model)
    if not config["single_spec"]:  # the name holds a time, which need not be the others'
        self.saved_model_file = group.gather(self.saved_model_file)[0]


@replaces("recbole.trainer.trainer.Trainer._save_checkpoint")
def _save_checkpoint(original: Callable, self: Any, *args: Any, **options: Any) -> None:
    config = self.config
    if config["single_spec"]:
        original(self, *args, **options)
        return
    if group.is_first():
        self.config = _alone(config)
        try:
            original(self, *args, **options)
        finally:
            self.config = config
    group.wait()  # the others may be about to read the file


def _alone(config: Any) -> Any:
    """A copy of a RecBole config for one process, which reads it from a file."""
    single = copy.copy(config)
    for name in ("final", "external", "variable", "cmd", "file"):
        options = getattr(config, f"{name}_config_dict", {})
        kept = {key: value for key, value in options.items() if key not in _OF_A_GROUP}
        setattr(single, f"{name}_config_dict", kept)
    single.final_config_dict.update(single_spec=True, local_rank=0)
    return single


@replaces("recbole.trainer.trainer.Trainer._map_reduce")
def _map_reduce(original: Callable, self: Any, result: Any, num_sample: int) -> Any:
    return result  # of all rows already


@replaces("recbole.evaluator.Collector.get_data_struct")
def _get_data_struct(original: Callable, self: Any) -> Any:
    # RecBole calls `cpu` of everything, also of the numbers and counts of the training data
    kept, struct = self.data_struct, type(self.data_struct)()
    for name, value in list(kept._data_dict.items()):
        struct.set(name, value.cpu() if isinstance(value, torch.Tensor) else value)
        if name in _COLLECTED:
            del kept[name]
    if self.config["single_spec"]:
        return struct
    parts = group.gather({name: struct.get(name) for name in _COLLECTED if name in struct})
    for name in _COLLECTED:
        found = [part[name] for part in parts if name in part]  # one may have had no rows
        if found:
            struct.set(name, torch.cat(found))
    return struct


@replaces("recbole.trainer.trainer.get_tensorboard")
def _get_tensorboard(original: Callable, logger: Any) -> Any:
    if group.is_first():
        return original(logger)
    writers = ("add_scalar", "add_hparams")
    return SimpleNamespace(**dict.fromkeys(writers, lambda *args, **kwargs: None))


@replaces("recbole.trainer.trainer.ensure_dir")
def _ensure_dir(original: Callable, dir_path: str) -> None:
    os.makedirs(dir_path, exist_ok=True)  # another process may be making it


@replaces("recbole.data.dataloader.abstract_dataloader.AbstractDataLoader.__bool__")
def _has_rows(original: None, self: Any) -> bool:
    # RecBole asks `if not valid_data`: of all processes, where this one has no rows
    return self.sample_size > 0
