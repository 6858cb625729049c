"""`Policy`: the mutable model, its adapters, and the per-token log-probs every loss is made of."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from temper.core.errors import DataError, DeviceError, IntegrityError, ShapeError
from temper.core.storage import FILES, read_json, verify_folder, whole_folder, write_json
from temper.policy.head import Head, Support, cross_entropy, token_values
from temper.policy.losses import LossOut

if TYPE_CHECKING:
    from temper.data.batch import Batch
    from temper.data.template import Template

log = logging.getLogger("temper.policy")
Precision = Literal["auto", "float32", "bfloat16"]
IDENTITY = "temper.json"  # beside the weights: their hash and the template's fingerprint
PROBE_TOKENS, PROBE_TOLERANCE = 4, 1e-3


@dataclass(frozen=True)
class TokenScores:
    """Per-token values in float32, zero where the batch's mask is false: log-prob, entropy (if asked), log Z."""

    logprobs_B_T: Tensor
    entropy_B_T: Tensor | None
    logz_B_T: Tensor


class Policy:
    """A transformers causal model with its tokenizer and template. Master weights stay float32.

    `compute_dtype` is what matrix products are done in; `version` counts the learner's updates.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, compute_dtype: torch.dtype = torch.float32, path: str = "") -> None:
        self.model, self.tokenizer, self.compute_dtype, self.path = model, tokenizer, compute_dtype, path
        self.version = 0
        self.check_head()

    @classmethod
    def load(cls, path: str | Path, *, precision: Precision = "auto", device: str = "auto", verify: bool = True) -> Policy:
        """Load a checkpoint folder or hub name in evaluation mode.

        A folder written by temper is verified against its hashes (IntegrityError). Raises DataError where there is
        no such checkpoint or weights are missing from it, DeviceError where the device is not here.
        """
        where = choose_device(device)
        dtype, reason = choose_precision(precision, where)
        folder = Path(path)
        if verify and (folder / FILES).is_file():
            verify_folder(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
            model, info = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a checkpoint that transformers can load", why=str(error).splitlines()[0],
                            do="give a folder with config.json, weights and tokenizer, or a hub name") from error  # fmt: skip
        if info["missing_keys"]:
            raise DataError(f"{path} lacks weights of its own architecture", why=f"{len(info['missing_keys'])} missing, first {sorted(info['missing_keys'])[0]}",
                            do="save the checkpoint again whole; missing weights would be random ones")  # fmt: skip
        policy = cls(model.to(where).eval(), tokenizer, compute_dtype=dtype, path=str(path))
        if verify and (folder / IDENTITY).is_file():
            recorded, found = read_json(folder / IDENTITY)["weights_hash"], policy.weights_hash()
            if recorded != found:
                raise IntegrityError(f"the weights of {path} are not the ones that were saved", why=f"recorded {recorded[:16]}, found {found[:16]}",
                                     do="restore the folder, or run again the stage that wrote it")  # fmt: skip
        log.info("policy %s on %s in %s (%s)", path, where, str(dtype).removeprefix("torch."), reason)
        return policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @cached_property
    def template(self) -> Template:
        """The chat template as versioned data."""
        from temper.data.template import Template

        return Template.of(self.tokenizer)

    # --- scores ---

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """The context that forward passes run in: autocast where the compute dtype is not float32."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @property
    def head(self) -> Head:
        """The output matrix, with the model's soft-capping. Raises ShapeError for a head of another form."""
        output = self.model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ShapeError(f"{type(self.model).__name__} has {type(output).__name__} for a head", why="temper computes log-probs through one matrix",
                             do="use a causal model with a linear language-model head")  # fmt: skip
        config = self.model.config.get_text_config()
        return Head(output.weight, output.bias, getattr(config, "final_logit_softcapping", None), self.compute_dtype)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden state of every position, after the final norm."""
        with self.computing():
            return self.model.get_decoder()(input_ids=batch.tokens_B_T, use_cache=False, **attention_inputs(batch)).last_hidden_state

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(flat positions, hidden states that predict them, their tokens) where the batch's mask is true."""
        if bool(batch.mask_B_T[:, 0].any()):
            raise ShapeError("the first position of a row is supervised", why="nothing stands before it to predict it", do="set weights[0] to 0")
        at_N = batch.mask_B_T.flatten().nonzero().squeeze(1)
        hidden_B_T_D = self.hidden_states(batch)
        return at_N, hidden_B_T_D.flatten(0, 1).index_select(0, at_N - 1), batch.tokens_B_T.flatten()[at_N]

    def token_logprobs(self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False) -> TokenScores:
        """log p(token | what stands before it) at the supervised positions, from logits / `temperature`; differentiable.

        Where the batch carries a support, probabilities are renormalised over the tokens it allows.
        """
        at_N, hidden_N_D, targets_N = self.supervised(batch)
        values = token_values(hidden_N_D, self.head, targets_N, temperature=temperature, entropy=entropy, support=support_of(batch, targets_N))
        spread = [None if value_N is None else scatter(value_N, at_N, batch.tokens_B_T.shape) for value_N in values]
        assert spread[0] is not None and spread[2] is not None
        return TokenScores(spread[0], spread[1], spread[2])

    def cross_entropy(self, batch: Batch, *, z_loss: float = 0.0) -> LossOut:
        """`losses.sft_cross_entropy` of this batch with the gradient formed in the forward: the cheap way to fine-tune."""
        at_N, hidden_N_D, targets_N = self.supervised(batch)
        total, logprobs_N, _ = cross_entropy(hidden_N_D, self.head, targets_N, batch.weights_B_T.flatten()[at_N], z_loss=z_loss)
        return LossOut(total, batch.mask_B_T.sum(), {"nll": -logprobs_N.sum()})

    def check_head(self) -> None:
        """Raise ShapeError where this model's logits are not those of its matrix and soft-cap alone."""
        tokens_1_T = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        with torch.no_grad():
            expected_T_V = self.model(input_ids=tokens_1_T, use_cache=False).logits[0].float()
            found_T_V = self.head.logits(self.model.get_decoder()(input_ids=tokens_1_T, use_cache=False).last_hidden_state[0])
        error = float((expected_T_V - found_T_V).abs().max() / expected_T_V.abs().max().clamp(min=1.0))
        if not error < PROBE_TOLERANCE:
            raise ShapeError(f"{type(self.model).__name__} forms its logits in a way temper does not know", why=f"they differ by {error:.2g} from hidden states times head",
                             do="use an architecture without logit scaling, or teach it to temper.policy.head.Head")  # fmt: skip

    # --- weights ---

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name, without any adapter's, sorted."""
        return dict(sorted(self.model.named_parameters()))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that takes a gradient, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def freeze_base(self) -> None:
        """Stop training the model's own parameters."""
        for weight in self.base_parameters().values():
            weight.requires_grad_(False)

    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and float32 bytes of the model's own parameters, sorted by name."""
        return hash_weights(self.base_parameters())

    def save(self, folder: str | Path) -> None:
        """Write a plain transformers checkpoint with tokenizer and template; adapters are left out.

        A new folder is whole or absent; an existing one (the scratch of `whole_folder`) is filled.
        """
        path = Path(folder)
        if path.is_dir() and not (path / FILES).is_file():
            self._write(path)
            return
        with whole_folder(path) as scratch:
            self._write(scratch)

    def _write(self, folder: Path) -> None:
        names = self.base_parameters().keys()
        state = {name: value for name, value in self.model.state_dict().items() if name in names}
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / IDENTITY, {"weights_hash": self.weights_hash()})

    def clone_reference(self) -> Policy:
        """A frozen copy in evaluation mode, adapters included: what this policy is now stays its reference."""
        clone = copy.copy(self)
        clone.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return clone


def choose_device(asked: str) -> torch.device:
    """The device that `asked` names; `auto` takes a GPU where there is one. Raises DeviceError."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device {asked!r} was asked for and there is no GPU here", why=f"PyTorch {torch.__version__} sees none",
                          do="set device=cpu or device=auto, or install a CUDA build of PyTorch")  # fmt: skip
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"there is no device {asked!r}", do="set device to auto, cpu or cuda") from error


def choose_precision(asked: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype and why: bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if asked == "float32":
        return torch.float32, "asked for"
    fast = device.type == "cuda" or has_bfloat16_units()
    if asked == "bfloat16":
        return torch.bfloat16, "asked for" if fast else "asked for; this processor has no bfloat16 units and emulates them slowly"
    return (torch.bfloat16, "this processor multiplies bfloat16") if fast else (torch.float32, "this processor has no bfloat16 units")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def attention_inputs(batch: Batch) -> dict[str, Tensor]:
    """What a decoder needs besides tokens. Right padding needs nothing: no real token sees what stands after it."""
    real_B_T, positions_B_T = batch.attention_B_T, batch.positions_B_T
    if bool((real_B_T[:, 1:] & ~real_B_T[:, :-1]).any()):
        return {"attention_mask": real_B_T.long(), "position_ids": positions_B_T}
    straight_1_T = torch.arange(positions_B_T.shape[1], device=positions_B_T.device)[None]
    if bool((positions_B_T == straight_1_T).where(real_B_T, True).all()):
        return {}
    return {"position_ids": positions_B_T}  # rows packed into one: transformers parts them where positions restart


def support_of(batch: Batch, targets_N: Tensor) -> Support | None:
    """The batch's support at its supervised positions, in their order; None where it carries none."""
    support_B = getattr(batch, "support", None)
    if support_B is None:
        return None
    allowed_N = [support_B[row][at] for row, at in batch.mask_B_T.nonzero().tolist()]
    return Support.of(allowed_N, targets_N)


def scatter(value_N: Tensor, at_N: Tensor, shape: torch.Size) -> Tensor:
    """`value_N` at the flat positions `at_N` of zeros of `shape`."""
    return value_N.new_zeros(shape.numel()).index_copy(0, at_N, value_N).view(shape)


def hash_weights(weights: dict[str, nn.Parameter]) -> str:
    """SHA-256 over names, shapes and float32 bytes, in the order given."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
