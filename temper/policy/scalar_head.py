"""`RewardModel`: a policy's backbone with one number for a head, read at the last token of the answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from temper.core.errors import DataError, ShapeError
from temper.data.batch import Batch, collate
from temper.data.layout import Kind
from temper.data.sequence import Sequence as Row
from temper.data.template import Template
from temper.policy.hardware import Precision
from temper.policy.inputs import scatter
from temper.policy.lean import Lean
from temper.policy.model import Policy
from temper.policy.packing import Packing
from temper.policy.saved import filled, hash_weights

WEIGHTS = "scalar_head.safetensors"


class ScalarModel(nn.Module):
    """What the learner trains: the decoder and `score`, which starts at zero, so that all answers start equal."""

    def __init__(self, decoder: nn.Module, config: Any) -> None:
        super().__init__()
        self.decoder, self.config = decoder, config
        width = config.get_text_config().hidden_size
        self.score = nn.Linear(width, 1, bias=False, device=next(decoder.parameters()).device, dtype=torch.float32)
        nn.init.zeros_(self.score.weight)


class RewardModel:
    """A scalar judge of answers, made from its own copy of a policy. `version` counts the learner's updates."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.copy(policy)
        self.policy.model, self.policy.router = copy.deepcopy((policy.model, policy.router))
        self.policy.model.float().requires_grad_(False)  # the decoder is trained, also where the policy's base was frozen
        self.policy.lean, self.policy.packing = Lean(self.policy.model, self.policy.model.get_decoder()), Packing(self.policy)
        self.model = ScalarModel(self.policy.model.get_decoder().requires_grad_(True), self.policy.model.config)
        self.model.train(policy.model.training)
        self.version = 0

    @classmethod
    def load(cls, folder: str | Path, *, precision: Precision = "auto", device: str = "auto", verify: bool = True) -> RewardModel:
        """Load a folder that `save` wrote, in evaluation mode. Raises DataError where it holds no scalar head."""
        head = Path(folder) / WEIGHTS
        if not head.is_file():
            raise DataError(
                f"{folder} is not a reward model", why=f"{WEIGHTS} is missing", do="give the folder that the reward stage wrote"
            )
        reward = cls(Policy.load(folder, precision=precision, device=device, verify=verify))
        reward.model.score.load_state_dict(load_file(head))
        return reward

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.policy.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are done in."""
        return self.policy.compute_dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return self.policy.tokenizer

    @property
    def template(self) -> Template:
        """The backbone's chat template."""
        return self.policy.template

    @property
    def path(self) -> str:
        """Where the backbone was loaded from."""
        return self.policy.path

    def scores(self, batch: Batch, at_N: Tensor) -> Tensor:
        """One float32 number for each flat position of the batch, read after its token; differentiable."""
        return self.model.score(self.policy.hidden_at(batch, at_N).float()).squeeze(-1)

    def kind(self, wanted: str = "auto") -> Kind:
        """How batches are laid out; see Policy.kind."""
        return self.policy.kind(wanted)

    def rewards(self, batch: Batch) -> Tensor:
        """One float32 reward a row, read at its last supervised token, or its last real one where none is; differentiable."""
        last_B = last_true(torch.where(batch.mask_B_T.any(-1, keepdim=True), batch.mask_B_T, batch.attention_B_T))
        rows, width = batch.tokens_B_T.shape
        return self.scores(batch, torch.arange(rows, device=last_B.device) * width + last_B)

    def values(self, batch: Batch) -> Tensor:
        """What was to be expected before each supervised token, [rows, positions], 0 elsewhere; differentiable.

        A token is predicted from the one before it, and so is its value.
        """
        at_N = batch.mask_B_T.flatten().nonzero().squeeze(1)
        return scatter(self.scores(batch, at_N - 1), at_N, batch.tokens_B_T.shape)

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]], *, rows_at_once: int = 16) -> list[float]:
        """The reward of each row of token ids; a row ends with the last token of the answer. Dropout is off meanwhile."""
        training = self.model.training
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
        found = [0.0] * len(rows)
        for start in range(0, len(order), rows_at_once):
            part = order[start : start + rows_at_once]
            made = [Row(tokens=list(rows[at]), weights=[0.0] * (len(rows[at]) - 1) + [1.0]) for at in part]
            rewards_B = self.rewards(collate(made, self.template.pad_id).to(self.device))
            for at, reward in zip(part, rewards_B.tolist(), strict=True):
                found[at] = reward
        self.model.train(training)
        return found

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that takes a gradient, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and float32 bytes of decoder and head."""
        return hash_weights(dict(sorted(self.model.named_parameters())))

    def save(self, folder: str | Path) -> None:
        """Write backbone, tokenizer and scalar head. A new folder is whole or absent; an existing one is filled."""
        with filled(Path(folder)) as scratch:
            self.policy.save(scratch)
            save_file({"weight": self.model.score.weight.detach().cpu().contiguous()}, scratch / WEIGHTS)


def last_true(mask_B_T: Tensor) -> Tensor:
    """The last position of each row where the mask is true. Raises ShapeError for a row without any."""
    if not bool(mask_B_T.any(-1).all()):
        raise ShapeError(f"row {int((~mask_B_T.any(-1)).nonzero()[0])} has no token to read a reward at", do="drop empty rows")
    return mask_B_T.shape[1] - 1 - mask_B_T.flip(-1).int().argmax(-1)
