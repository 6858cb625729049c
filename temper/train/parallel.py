"""More than one process: the same stage under torchrun, every rank with a shard of the weights and a share of each step.

Every rank plans the same steps; the learner takes micro-batches `rank, rank + world, …` of each. Weights, gradients and
moments are sharded with FSDP2, gradients are summed (the denominator is already the whole step's), and rank 0 alone
writes what is not a shard. On one process nothing here does anything.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.core import progress
from temper.core.errors import DeviceError, TemperError
from temper.policy.recompute import decoder_layers

PATIENCE = datetime.timedelta(hours=6)  # how long a rank waits for another, for example while rank 0 scores a reference
GONE = ("connection closed", "connection reset", "broken pipe", "socket", "remote process exited", "gloo", "nccl", "timed out")


class RankLostError(TemperError, RuntimeError):
    """Another process of this job is gone, so no step can be finished."""


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(device: str) -> None:
    """Join the other processes that torchrun started, once; nothing where it started none. Raises DeviceError."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        place, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= here:
            raise DeviceError(f"local rank {place} has no GPU of its own", why=f"{here} are visible", do=f"torchrun --nproc-per-node {here}")
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if rank():
        progress.silence()
    signal.signal(signal.SIGTERM, _stopped)


def _stopped(number: int, frame: Any) -> NoReturn:
    print(f"rank {rank()} of {world()} was told to stop, by hand or because another rank ended: {AGAIN}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


AGAIN = "the same command goes on from the last checkpoint, on this or another number of ranks"


@contextmanager
def together(what: str) -> Iterator[None]:
    """Inside the block the ranks wait for each other: where one is gone, RankLostError says so and what to do."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        if world() == 1 or isinstance(error, TemperError) or not (isinstance(error, dist.DistError) or any(word in told for word in GONE)):
            raise
        raise RankLostError(
            f"rank {rank()} of {world()} lost another rank during {what}",
            why=str(error).splitlines()[0],
            do=f"look for the rank that ended first (torchrun names it, with its exit code); {AGAIN}",
        ) from error


def wait() -> None:
    """Return when every rank has come here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes through the block, then the others: what it wrote is there when they look."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


def tell(value: Any) -> Any:
    """What rank 0 gave as `value`, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def gathered(mine: list[Any]) -> list[Any]:
    """The items of all ranks in the order of `share`: item i comes from rank i % world. Of one process, `mine`."""
    if world() == 1:
        return mine
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, mine, group=_cpu_group())
    return [parts[at % world()][at // world()] for at in range(sum(map(len, parts)))]


@cache
def _cpu_group() -> Any:
    """Objects travel through the CPU: on a GPU they would be copied there and back."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def share(items: Any) -> list[Any]:
    """This rank's part of `items`: every world-th, from its own number on."""
    return [items[at] for at in range(rank(), len(items), world())]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in float64; the names are the same on every rank."""
    if world() == 1:
        return dict(values)
    names = sorted(values)
    sums = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def spread(batches: list[list[int]]) -> list[list[int]]:
    """`batches` with the largest halved until every rank has one, where there are rows enough; no gradient depends on it."""
    while len(batches) < world() and max(map(len, batches)) > 1:
        at = max(range(len(batches)), key=lambda number: len(batches[number]))
        half = (len(batches[at]) + 1) // 2
        batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
    return batches


# --- weights ---


def shard(trained: Any) -> None:
    """Shard the model of a Policy or RewardModel over all ranks (FSDP2), layer by layer, embeddings and head as one more part.

    Each rank keeps its share of the weights it already holds, which are the same everywhere. Weights outside a layer
    stay gathered from the forward to the end of the backward, because the head is read outside any module's forward.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    model, policy = trained.model, getattr(trained, "policy", trained)
    decoder, head = policy.model.get_decoder(), policy.model.get_output_embeddings()
    tied = head.weight is policy.model.get_input_embeddings().weight
    # a reward model leaves its backbone's head out; one that is tied must still be saved as the embeddings are
    model.__dict__["tied_outside"] = head if tied and all(module is not head for module in model.modules()) else None
    mesh = dist.init_device_mesh(trained.device.type, (world(),))
    for layer in decoder_layers(decoder):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # sums, where FSDP would average: the loss is already Σ/N of the whole step
    model.decode = lambda **inputs: decoder(**inputs).last_hidden_state
    register_fsdp_forward_method(model, "decode")
    policy.decode = model.decode
    with torch.no_grad(), policy.computing():  # the first forward decides which module is the root, and an engine may come before the learner
        policy.decode(input_ids=torch.zeros(1, 1, dtype=torch.long, device=trained.device), use_cache=False)
    model.reshard()


def sharded(model: nn.Module) -> bool:
    """Whether `shard` went over this model."""
    return hasattr(model, "set_reshard_after_forward")


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside the block every rank's device holds all weights, to sample or hash; no forward in it waits for another rank."""
    if not sharded(model):
        yield
        return
    parts: list[Any] = [module for module in model.modules() if sharded(module)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@contextmanager
def on_rank_zero(model: Any) -> Iterator[bool]:
    """Inside the block rank 0's model holds all weights on the CPU, to be written; gives whether this is rank 0.

    Gathered one by one, so no device ever holds the whole.
    """
    if not sharded(model):
        yield rank() == 0
        return
    before, full = [], {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in full:
                values = weight.full_tensor()
                full[id(weight)] = nn.Parameter(values.cpu(), requires_grad=weight.requires_grad) if rank() == 0 else weight
            before.append((module, name, weight))
    if model.tied_outside is not None:
        embeddings = next(weight for module, _, weight in before if isinstance(module, nn.Embedding))
        full[id(model.tied_outside.weight)] = full[id(embeddings)]
        before.append((model.tied_outside, "weight", model.tied_outside.weight))
    try:
        for module, name, weight in before:
            module._parameters[name] = full[id(weight)]
        yield rank() == 0
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight


def spread_like(values: Tensor, weight: Tensor) -> Tensor:
    """This rank's shard of `values`, laid out as `weight` is; all of them, on its device, where `weight` is not sharded."""
    if not hasattr(weight, "placements"):
        return values.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    sharded_weight: Any = weight
    return distribute_tensor(values.to(weight.device), sharded_weight.device_mesh, sharded_weight.placements, src_data_rank=None)


# --- checkpoints ---


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `tensors` as a distributed checkpoint: each rank its own shards. All ranks call it with one folder."""
    from torch.distributed import checkpoint

    checkpoint.save(tensors, checkpoint_id=folder)


def is_sharded(folder: Path) -> bool:
    """Whether `save_shards` wrote this folder."""
    return (folder / ".metadata").is_file()


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a distributed checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    found: Any = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: (item.size, item.properties.dtype) for name, item in found.items()}


def load_shards(into: dict[str, Tensor], folder: Path) -> None:
    """Fill `into`, whole tensors or shards, from a distributed checkpoint written on any number of ranks."""
    from torch.distributed import checkpoint

    checkpoint.load(into, checkpoint_id=folder, no_dist=world() == 1)
