"""Attention masks for rows of different lengths, for full and sliding-window layers alike."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from temper.core.errors import ConfigError

KINDS = ("full_attention", "sliding_attention")


class Masks:
    """Knows which masks a model's layers want, and makes them.

    Raises ConfigError for a model whose layers keep state that slots cannot hold, or whose attention takes no mask.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.window: int | None = getattr(config, "sliding_window", None)
        listed = getattr(config, "layer_types", None)
        self.kinds: set[str] = set(listed or ["sliding_attention" if self.window else "full_attention"])
        self.by_kind = bool(listed) and "sliding_attention" in self.kinds
        self.implementation = str(getattr(config, "_attn_implementation", "sdpa"))
        unknown = self.kinds - set(KINDS)
        if unknown:
            why = f"its layers are of kind {', '.join(sorted(unknown))}; the engine knows {' and '.join(KINDS)}"
            raise ConfigError(f"the engine cannot sample from {type(model).__name__}", why=why, do="use a decoder with plain attention")
        if self.implementation not in ("sdpa", "eager"):
            why = f"attention {self.implementation!r} takes no mask of several row lengths"
            raise ConfigError(f"the engine cannot sample from {type(model).__name__}", why=why, do="load it with attn_implementation='sdpa'")

    def __call__(self, positions_R_T: Tensor, reach: int, *, fresh: bool, dtype: torch.dtype) -> Tensor | dict[str, Tensor | None] | None:
        """What to pass as `attention_mask`: position i sees key j where j ≤ i, and i − j < window on sliding layers.

        Where rows are fresh and a layer sees everything, None stands for 'causal', which is faster than a mask.
        """
        if self.by_kind:
            return {kind: self._of(kind, positions_R_T, reach, fresh, dtype) for kind in self.kinds}
        return self._of(next(iter(self.kinds)), positions_R_T, reach, fresh, dtype)

    def _of(self, kind: str, positions_R_T: Tensor, reach: int, fresh: bool, dtype: torch.dtype) -> Tensor | None:
        windowed = kind == "sliding_attention" and self.window is not None and reach > self.window
        if fresh and not windowed and self.implementation == "sdpa":
            return None
        if fresh:
            positions_R_T = torch.arange(reach, device=positions_R_T.device)[None]
        keys_K = torch.arange(reach, device=positions_R_T.device)
        distance_R_T_K = positions_R_T[..., None] - keys_K
        seen_R_T_K = distance_R_T_K >= 0
        if windowed and self.window is not None:
            seen_R_T_K &= distance_R_T_K < self.window
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen_R_T_K.shape, dtype=dtype, device=keys_K.device).masked_fill_(~seen_R_T_K, lowest)[:, None]
