"""Which tokens were allowed where a token was sampled, so that log-probs are of the distribution really sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from temper.core.errors import DataError

FORBIDDEN = -1e30  # finite, so that 0 · FORBIDDEN is 0 and not NaN


@dataclass(frozen=True)
class Support:
    """Which tokens were allowed, for the rows where not all were: those listed, or all but those listed.

    Token `id_M[i]` is listed in row `row_M[i]`; rows ascend in `row_M`. `listed_N` marks rows whose list is of what was
    allowed. In any other row it is of what was not, and empty where everything was allowed.
    """

    listed_N: Tensor
    row_M: Tensor
    id_M: Tensor

    @classmethod
    def of(cls, allowed_N: Sequence[Sequence[int] | None], targets_N: Tensor) -> Support | None:
        """The support of N rows as `Sampled.support` writes them: ids, or −1 − id for each that was not allowed; None: everything.

        Raises DataError where a row's target is not allowed in it.
        """
        if all(allowed is None for allowed in allowed_N):
            return None
        lists = [allowed or () for allowed in allowed_N]
        lengths_N = torch.tensor([len(ids) for ids in lists])
        # not torch.tensor: it takes ten times as long, and there may be millions
        id_M = torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int64, int(lengths_N.sum())))
        row_M = torch.arange(len(lists)).repeat_interleave(lengths_N)
        listed_N = torch.tensor([allowed is not None and (not allowed or allowed[0] >= 0) for allowed in allowed_N])
        id_M = id_M.where(id_M >= 0, -1 - id_M)
        found_N = torch.zeros(len(lists), dtype=torch.bool)
        found_N[row_M[id_M == targets_N.cpu()[row_M]]] = True
        wrong = (found_N != listed_N).nonzero()[:, 0].tolist()
        if wrong:
            row = wrong[0]
            raise DataError(
                f"supervised token {row} is {int(targets_N[row])}, which its support does not allow",
                why=f"{len(lists[row])} tokens are allowed there" if listed_N[row] else f"all tokens but {len(lists[row])} are allowed there",
                do="record the support of the distribution that was really sampled",
            )
        device = targets_N.device
        return cls(listed_N.to(device), row_M.to(device), id_M.to(device))

    def forbid(self, logits_R_V: Tensor, start: int) -> None:
        """Set the logits that are not allowed in rows start … start+R to FORBIDDEN, in place."""
        rows = logits_R_V.shape[0]
        low, high = torch.searchsorted(self.row_M, torch.tensor([start, start + rows], device=self.row_M.device)).tolist()
        allowed_R_V = (~self.listed_N[start : start + rows, None]).expand(-1, logits_R_V.shape[1]).clone()
        allowed_R_V[self.row_M[low:high] - start, self.id_M[low:high]] = self.listed_N[self.row_M[low:high]]
        logits_R_V.masked_fill_(~allowed_R_V, FORBIDDEN)
