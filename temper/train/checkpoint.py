"""What a learner's checkpoint holds on disk: two files from one process, shards from several; either is read by any number.

A tensor is called `<weight>|<field>`, where the field is `weight` for the weight itself and the optimizer's own word for
each of its moments; torch's generators are called `rng|<device>|<rank>`. state.json holds what is not a tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from temper.core.errors import IntegrityError
from temper.core.storage import read_json, write_json
from temper.train import parallel

WEIGHTS, MOMENTS, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


def write(folder: Path, weights: dict[str, nn.Parameter], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write everything into `folder`. Of several ranks each writes its shards, and rank 0 the state."""
    streams = {f"rng|{name}|{parallel.rank()}": value for name, value in torch_streams().items()}
    if parallel.world() > 1:
        parallel.save_shards({f"{name}|weight": weight.detach() for name, weight in weights.items()} | moments | streams, folder)
    else:
        save_file(on_cpu({name: weight.detach() for name, weight in weights.items()}), folder / WEIGHTS)
        save_file(on_cpu(moments | streams), folder / MOMENTS)
    if parallel.rank() == 0:
        write_json(folder / STATE, state)


def read(folder: Path, weights: dict[str, nn.Parameter], total_steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fill `weights` and torch's generators from `folder`; return the state, and the moments laid out as their weights are.

    The generators of ranks that were not there when it was written stay as they are: only dropout sees it. Raises
    IntegrityError where the folder is of other weights, or of a run of another length.
    """
    state = read_json(folder / STATE)
    sharded = parallel.is_sharded(folder)
    saved = {name.removesuffix("|weight") for name in parallel.shapes(folder) if name.endswith("|weight")} if sharded else names_in(folder / WEIGHTS)
    if saved != weights.keys() or state["total_steps"] != total_steps:
        odd = sorted(saved ^ weights.keys())[:3]
        raise IntegrityError(f"checkpoint {folder} is of another run", why=f"{state['total_steps']} steps against {total_steps}; weights that differ: {odd}",
                             do="remove the run folder and start again")  # fmt: skip
    found = from_shards(folder, weights) if sharded else from_files(folder, weights)
    mine = f"|{parallel.rank()}"
    restore_torch_streams({name.split("|")[1]: value for name, value in found.items() if name.startswith("rng|") and name.endswith(mine)})
    return state, {name: value for name, value in found.items() if not name.startswith("rng|")}


def names_in(path: Path) -> set[str]:
    """The names of a safetensors file's tensors."""
    with safe_open(path, "pt") as file:
        return set(file.keys())


@torch.no_grad()
def from_files(folder: Path, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments and generators of one process's checkpoint; `weights` are filled."""
    for name, value in load_file(folder / WEIGHTS).items():
        weights[name].copy_(parallel.spread_like(value, weights[name]))
    found = load_file(folder / MOMENTS)
    for name, value in found.items():
        weight = weights.get(name.rpartition("|")[0])
        if weight is not None:
            found[name] = parallel.spread_like(value, weight) if value.shape == weight.shape else value.to(weight.device)
    return found


def from_shards(folder: Path, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments and generators of several ranks' checkpoint; `weights` are filled."""
    into: dict[str, Tensor] = {}
    for name, (shape, dtype) in parallel.shapes(folder).items():
        of, _, field = name.rpartition("|")
        weight = weights.get(of)
        if field == "weight" and weight is not None:
            into[name] = weight.detach()
        elif weight is not None:
            into[name] = torch.zeros_like(weight.detach(), dtype=dtype) if shape == weight.shape else torch.zeros(shape, dtype=dtype, device=weight.device)
        elif field == str(parallel.rank()):
            into[name] = torch.zeros(shape, dtype=dtype)
    parallel.load_shards(into, folder)
    return {name: value for name, value in into.items() if not name.endswith("|weight")}


def moments_of(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state of every weight, tensor by tensor."""
    return {f"{name}|{field}": value.detach() for name, weight in weights.items() for field, value in optimizer.state.get(weight, {}).items()}


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as safetensors writes them."""
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def torch_streams() -> dict[str, Tensor]:
    """The state of torch's own generators: the CPU's, and the current CUDA device's where there is one."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def restore_torch_streams(states: dict[str, Tensor]) -> None:
    """Put torch's generators back to what `torch_streams` read, as far as it was read."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

