"""Which tokens were allowed where a token was sampled, so that log-probs are of the distribution really sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from temper.core.errors import DataError

FORBIDDEN = -1e30  # finite, so that 0 · FORBIDDEN is 0 and not NaN


@dataclass(frozen=True)
class Support:
    """Which tokens were allowed, for the rows where not all were: token `id_M[i]` in row `row_M[i]`.

    `restricted_N` marks rows with a list; all others allow the whole vocabulary. Rows ascend in `row_M`.
    """

    restricted_N: Tensor
    row_M: Tensor
    id_M: Tensor

    @classmethod
    def of(cls, allowed_N: Sequence[Sequence[int] | None], targets_N: Tensor) -> Support | None:
        """The support of N rows (None: everything). Raises DataError where a row's target is not allowed in it."""
        if all(allowed is None for allowed in allowed_N):
            return None
        for row, (allowed, target) in enumerate(zip(allowed_N, targets_N.tolist(), strict=True)):
            if allowed is not None and target not in set(allowed):
                raise DataError(
                    f"supervised token {row} is {target}, which its support does not allow",
                    why=f"{len(allowed)} tokens are allowed there",
                    do="record the support of the distribution that was really sampled",
                )
        device = targets_N.device
        lists = [(row, torch.as_tensor(allowed)) for row, allowed in enumerate(allowed_N) if allowed is not None]
        return cls(
            torch.tensor([allowed is not None for allowed in allowed_N], device=device),
            torch.cat([torch.full((len(ids),), row) for row, ids in lists]).to(device),
            torch.cat([ids for _, ids in lists]).to(device),
        )

    def forbid(self, logits_R_V: Tensor, start: int) -> None:
        """Set the logits that are not allowed in rows start … start+R to FORBIDDEN, in place."""
        rows = logits_R_V.shape[0]
        low, high = torch.searchsorted(self.row_M, torch.tensor([start, start + rows], device=self.row_M.device)).tolist()
        allowed_R_V = (~self.restricted_N[start : start + rows, None]).expand(-1, logits_R_V.shape[1]).clone()
        allowed_R_V[self.row_M[low:high] - start, self.id_M[low:high]] = True
        logits_R_V.masked_fill_(~allowed_R_V, FORBIDDEN)
