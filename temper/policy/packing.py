"""Whether a model computes packed rows, and rows that share a beginning, as it computes rows alone: found by trying.

A model whose layers carry a state from token to token (Mamba, RWKV, linear attention), attend in chunks, or see a row
in any way that transformers' attention interface does not tell, would leak between sequences of one row. Such a model is
told by its layer types, by layers that never ask the interface, or by the trial: it is padded, and the log says why.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, get_args

import torch

from temper.core.errors import ConfigError, ShapeError
from temper.data.batch import Batch, collate
from temper.data.layout import WORTH_SHARING, Kind
from temper.data.sequence import Sequence
from temper.policy import attention

if TYPE_CHECKING:
    from temper.policy.model import Policy

log = logging.getLogger("temper.policy")
ATTEND = {"full_attention", "sliding_attention"}  # layer types that see tokens through the interface alone
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of the largest value; a leak is far above


class Packing:
    """What one policy can do with a `Layout`; tried once, when first asked."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._tried: tuple[str | None] | None = None
        self._said: set[str] = set()

    @property
    def because(self) -> str | None:
        """Why rows must be padded, or None."""
        if self._tried is None:
            self._tried = (self._model_cannot(),)
        return self._tried[0] or self._use_forbids()

    def kind(self, wanted: str) -> Kind:
        """The kind of layout to collate batches in. Raises ConfigError for a name that is none."""
        if wanted not in ("auto", *get_args(Kind)):
            raise ConfigError(f"there is no layout {wanted!r}", do=f"set layout to auto, {', '.join(get_args(Kind))}")
        if wanted == "padded":
            return "padded"
        reason = self.because
        if reason is not None:
            self._say(f"rows are padded, one sequence each: {reason}")
            return "padded"
        found: Kind = "packed" if wanted == "packed" else "shared"
        self._say("rows are packed without padding" + (", what they begin with alike is computed once" if found == "shared" else ""))
        return found

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("%s: %s", self.policy.path or type(self.policy.model).__name__, text)

    def _use_forbids(self) -> str | None:
        """What about the run, rather than the model, stands against packing."""
        dropout = getattr(self.policy.model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
        if dropout and self.policy.model.get_decoder().training:
            return f"attention_dropout is {dropout}, and no kernel for packed rows has dropout"
        if self.policy.device.type == "cuda" and self.policy.compute_dtype is torch.float32:
            return "PyTorch's variable-length kernel has no float32 on CUDA"
        return None

    def _model_cannot(self) -> str | None:
        policy = self.policy
        if policy.lean.config is None:
            return f"attention of {type(policy.model).__name__} is {policy.lean.given!r}, not sdpa"
        config = policy.model.config.get_text_config()
        if odd := sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - ATTEND):
            return f"it has layers of type {', '.join(odd)}, which carry more than attention does from token to token"
        return self._trial()

    @torch.no_grad()
    def _trial(self) -> str | None:
        """Rows that share a beginning, and one that does not, packed and alone; and how many layers asked the interface."""
        policy, decoder = self.policy, self.policy.model.get_decoder()
        training = decoder.training
        decoder.eval()
        try:
            batch = trial_batch(policy.model.config.get_text_config().vocab_size).to(policy.device)
            assert batch.layout is not None
            alone_R_L_D = policy.computed(batch, None)
            with attention.counted() as count:
                found_R_L_D = policy.computed(batch, batch.layout)
        except (ShapeError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            return f"it does not take a layout ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        finally:
            decoder.train(training)
        layers = getattr(decoder.config, "num_hidden_layers", None)
        if count[0] != layers:
            return f"{count[0]} of its {layers} layers attend through transformers' interface"
        real_N = batch.attention_B_T.flatten().nonzero().squeeze(1)
        alone_N_D, found_N_D = alone_R_L_D.flatten(0, 1)[real_N].float(), found_R_L_D.flatten(0, 1)[batch.layout.at_B_T.flatten()[real_N]].float()
        apart = float((alone_N_D - found_N_D).abs().max() / alone_N_D.abs().max().clamp(min=1e-6))
        if not apart < TOLERANCE[policy.compute_dtype]:
            return f"packed rows differ from rows alone by {apart:.2g}: its layers see more than their own sequence"
        return None


def trial_batch(vocabulary: int) -> Batch:
    """Three rows of which two begin alike."""
    shared = [(7 * at + 3) % vocabulary for at in range(WORTH_SHARING)]
    rows: list[list[int]] = [[*shared, 5, 2, 9], [*shared, 8, 1], [(5 * at + 1) % vocabulary for at in range(6)]]
    made: list[Any] = [[token % vocabulary for token in row] for row in rows]
    return collate([Sequence(tokens=row, weights=[0.0] * (len(row) - 1) + [1.0]) for row in made], 0, "shared")
