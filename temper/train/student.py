"""A student made of its teacher: some of the layers, and where asked some of the neurons, between the same embeddings and head."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from temper.core.errors import ConfigError
from temper.policy.model import Policy

LAYER = re.compile(r"(^|.*\.)layers\.(\d+)\.(.*)")


def count_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def pick_layers(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` layers, evenly spaced, with the first and the last. Raises ConfigError where there are not so many."""
    if wanted > total:
        raise ConfigError(f"the student wants {wanted} layers of a teacher that has {total}", do=f"set student.layers to at most {total}")
    return [0] if wanted == 1 else [round(at * (total - 1) / (wanted - 1)) for at in range(wanted)]


def make_student(teacher: Policy, *, layers: int | None = None, take: tuple[int, ...] | None = None, intermediate: int | None = None) -> Policy:
    """A policy with the teacher's embeddings, norms and head and the chosen layers' weights. Raises ConfigError."""
    config = copy.deepcopy(teacher.model.config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    chosen = list(take) if take is not None else pick_layers(total, layers or total)
    if not chosen or any(not 0 <= layer < total for layer in chosen):
        raise ConfigError(f"student.take is {chosen}, the teacher has layers 0 to {total - 1}", do="name layers that it has")
    text.num_hidden_layers = len(chosen)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in chosen]
    state = {name: value for name, value in teacher.model.state_dict().items() if ".lora." not in name}
    if not any(LAYER.match(name) for name in state):
        raise ConfigError(f"{type(teacher.model).__name__} has no `layers` to choose from", do="give student.checkpoint instead")
    if intermediate is not None:
        narrow(state, text, intermediate)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: state[source(name, chosen)] for name in model.state_dict()})
    return Policy(model.to(teacher.device), teacher.tokenizer, compute_dtype=teacher.compute_dtype, path=f"{teacher.path} at layers {chosen}")


def source(name: str, chosen: list[int]) -> str:
    """The teacher's name of the student's weight `name`."""
    found = LAYER.match(name)
    return name if found is None else f"{found[1]}layers.{chosen[int(found[2])]}.{found[3]}"


def narrow(state: dict[str, Tensor], config: object, width: int) -> None:
    """Keep in every gated MLP of `state` the `width` neurons with the largest product of norms. Raises ConfigError."""
    ups = [name for name in state if name.endswith("mlp.up_proj.weight")]
    if not ups or width > config.intermediate_size:  # type: ignore[attr-defined]
        raise ConfigError(f"student.intermediate is {width}", why="the teacher has no gated MLP as wide as that", do="leave it out, or lower it")
    for name in ups:
        prefix = name.removesuffix("up_proj.weight")
        gate, up, down = (state[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = strength.topk(width).indices.sort().values
        state |= {f"{prefix}gate_proj.weight": gate[kept], f"{prefix}up_proj.weight": up[kept], f"{prefix}down_proj.weight": down[:, kept]}
        state |= {f"{prefix}{part}_proj.bias": state[f"{prefix}{part}_proj.bias"][kept] for part in ("gate", "up") if f"{prefix}{part}_proj.bias" in state}
    config.intermediate_size = width  # type: ignore[attr-defined]
