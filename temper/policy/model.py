"""`Policy`: the mutable model, its adapters, and the per-token log-probs every loss is made of."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from temper.core.errors import ConfigError, DataError, IntegrityError, ShapeError
from temper.core.storage import FILES, verify_folder, write_json
from temper.data.batch import Batch
from temper.data.golden import require_card, write_card
from temper.data.layout import Kind, Layout
from temper.data.template import Template
from temper.policy import adapters, peft_format
from temper.policy.adapters import LoraConfig
from temper.policy.bars import only_slow_ones
from temper.policy.frozen import hold_frozen, widen
from temper.policy.hardware import Precision, choose_device, choose_precision, keep_freed_memory
from temper.policy.head import Divergence, Head, cross_entropy, divergence, token_values
from temper.policy.inputs import decoder_inputs, scatter, support_of
from temper.policy.last_layer import computing_only
from temper.policy.lean import Lean
from temper.policy.linear import pack_layers
from temper.policy.lora_linear import Router
from temper.policy.losses import LossOut
from temper.policy.merging import Merge
from temper.policy.packing import Packing
from temper.policy.products import prefer_onednn
from temper.policy.quantised import Quantisation
from temper.policy.recompute import decoder_layers, recomputing
from temper.policy.saved import IDENTITY, check_identity, filled, hash_weights, read_checkpoint

log = logging.getLogger("temper.policy")
PROBE_TOKENS, PROBE_TOLERANCE = 4, {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class TokenScores:
    """Per-token values in float32, zero where the batch's mask is false: log-prob, entropy (if asked), log Z."""

    logprobs_B_T: Tensor
    entropy_B_T: Tensor | None
    logz_B_T: Tensor


class Policy:
    """A transformers causal model with its tokenizer and template. What is trained stays float32.

    `compute_dtype` is what matrix products are done in; `version` counts the learner's updates.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, compute_dtype: torch.dtype = torch.float32, path: str = ""
    ) -> None:
        self.model, self.tokenizer, self.compute_dtype, self.path = model, tokenizer, compute_dtype, path
        self.version = 0
        self.recompute = False  # activation checkpointing: keep the layers' inputs only, and run them again in the backward
        prefer_onednn()
        keep_freed_memory()
        self.router = Router()
        self._merge: Merge | None = None
        self.lean = Lean(model, model.get_decoder())
        self.packing = Packing(self)
        self.check_head()

    @classmethod
    def load(
        cls, path: str | Path, *, precision: Precision = "auto", device: str = "auto", frozen: bool = False, verify: bool = True
    ) -> Policy:
        """Load a checkpoint folder or hub name in evaluation mode; `frozen` where its own weights will not be trained.

        Raises as `read_checkpoint` does, and DeviceError where the device is not here.
        """
        where = choose_device(device)
        dtype, reason = choose_precision(precision, where)
        only_slow_ones()
        model, tokenizer = read_checkpoint(path, verify=verify)
        model.to(where).eval()  # type: ignore[arg-type]
        widen(model, but=dtype if frozen and where.type == "cuda" else None)
        policy = cls(model, tokenizer, compute_dtype=dtype, path=str(path))
        if frozen:
            policy.freeze_base()
        if verify:
            check_identity(path, policy.weights_hash)
        require_card(tokenizer, Path(path))
        log.debug("policy %s on %s in %s (%s)", path, where, str(dtype).removeprefix("torch."), reason)
        return policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @cached_property
    def template(self) -> Template:
        """The chat template as versioned data."""
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
            raise ShapeError(
                f"{type(self.model).__name__} has {type(output).__name__} for a head",
                why="temper computes log-probs through one matrix",
                do="use a causal model with a linear language-model head",
            )
        config = self.model.config.get_text_config()
        return Head(output.weight, output.bias, getattr(config, "final_logit_softcapping", None), self.compute_dtype)

    @property
    def padded_because(self) -> str | None:
        """Why rows must be computed one by one (what the model is, or how it is used); None where they may share a row."""
        return self.packing.because

    def kind(self, wanted: str = "auto") -> Kind:
        """How batches of this policy are laid out: `wanted`, or for `auto` with shared beginnings computed once.

        Where the model cannot follow a layout it is `padded`, and the log says why.
        """
        return self.packing.kind(wanted)

    def hidden_at(self, batch: Batch, at_N: Tensor) -> Tensor:
        """The last hidden state, after the final norm, at flat positions of the batch; each row through its own adapter."""
        layout = None if batch.layout is None or self.padded_because else batch.layout
        computed_N = at_N if layout is None else layout.at_B_T.flatten()[at_N]
        return self.computed(batch, layout, computed_N).flatten(0, 1).index_select(0, computed_N)

    def computed(self, batch: Batch, layout: Layout | None, read_N: Tensor | None = None) -> Tensor:
        """The last hidden state of every position as it is computed: [rows, positions, D] of the layout, or of the batch.

        With `read_N` it is right at those flat positions alone, and cheaper.
        """
        read_M = None if read_N is None or self.lean.last_mlp is None else read_N.unique()
        running = partial(self.running, batch.adapters if layout is None else layout.adapters, layout, read_M)
        layers = decoder_layers(self.model.get_decoder()) if self.recompute else []
        with running(), recomputing(layers, running):
            return self.decode(use_cache=False, **decoder_inputs(batch, layout))

    def decode(self, **inputs: Any) -> Tensor:
        """The decoder's last hidden state. Training on several ranks puts a method here that gathers the weights first."""
        return self.model.get_decoder()(**inputs).last_hidden_state  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def running(self, names: Sequence[str | None], layout: Layout | None, read_N: Tensor | None = None) -> Iterator[None]:
        """Inside the block layers run with their rows' adapters, in the compute dtype, the lean way; in a recomputation too."""
        last_mlp = self.lean.last_mlp if len(set(names)) == 1 else None  # rows of several adapters must stay rows
        with self.use(names), self.computing(), self.lean.forward(self.compute_dtype, layout), computing_only(last_mlp, read_N):
            yield

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(flat positions, hidden states that predict them, their tokens) where the batch's mask is true."""
        mask_B_T = batch.mask_B_T
        if bool(mask_B_T[:, 0].any()):
            raise ShapeError(
                "the first position of a row is supervised", why="nothing stands before it to predict it", do="set weights[0] to 0"
            )
        at_N = mask_B_T.flatten().nonzero().squeeze(1)
        return at_N, self.hidden_at(batch, at_N - 1), batch.tokens_B_T.flatten()[at_N]

    def token_logprobs(self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False) -> TokenScores:
        """log p(token | what stands before it) at the supervised positions, from logits / `temperature`; differentiable.

        Where the batch carries a support, probabilities are renormalised over the tokens it allows.
        """
        at_N, hidden_N_D, targets_N = self.supervised(batch)
        values = token_values(
            hidden_N_D, self.head, targets_N, temperature=temperature, entropy=entropy, support=support_of(batch, targets_N)
        )
        spread = [None if value_N is None else scatter(value_N, at_N, batch.tokens_B_T.shape) for value_N in values]
        assert spread[0] is not None
        assert spread[2] is not None
        return TokenScores(spread[0], spread[1], spread[2])

    def cross_entropy(self, batch: Batch, *, z_loss: float = 0.0) -> LossOut:
        """`losses.sft_cross_entropy` of this batch with the gradient formed in the forward: the cheap way to fine-tune."""
        at_N, hidden_N_D, targets_N = self.supervised(batch)
        total, logprobs_N, _ = cross_entropy(hidden_N_D, self.head, targets_N, batch.weights_B_T.flatten()[at_N], z_loss=z_loss)
        return LossOut(total, batch.mask_B_T.sum(), {"nll": -logprobs_N.sum()})

    def divergence(self, batch: Batch, teacher: Policy, measure: Divergence, *, temperature: float = 1.0) -> LossOut:
        """Σ weight·measure(self, teacher) over supervised positions, for example `losses.reverse_kl` (white-box distillation).

        The teacher scores the same tokens, so its vocabulary must be this one's: across tokenizers DataError. Where one head has
        more rows than the other (padding behind the vocabulary), both are normalised over the rows they have in common.
        """
        if teacher.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise DataError(
                f"{teacher.path} and {self.path} have different tokenizers",
                why="their distributions are over different tokens",
                do="distil from text that the teacher wrote, by sft",
            )
        at_N, hidden_N_D, _ = self.supervised(batch)
        with torch.no_grad():
            _, teacher_N_D, _ = teacher.supervised(batch)
        rows = min(len(self.head.weight_V_D), len(teacher.head.weight_V_D))
        of_teacher, weights_N = teacher.head.first(rows).ready(teacher_N_D), batch.weights_B_T.flatten()[at_N]
        total, values_N = divergence(
            hidden_N_D, self.head.first(rows), lambda tile: of_teacher.logits(teacher_N_D[tile]), weights_N, measure, temperature=temperature
        )
        return LossOut(total, batch.mask_B_T.sum(), {"divergence": values_N.sum()})

    def check_head(self) -> None:
        """Raise ShapeError where this model's logits are not those of its matrix and soft-cap alone."""
        tokens_1_T = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        with torch.no_grad(), self.computing():
            expected_T_V = self.model(input_ids=tokens_1_T, use_cache=False).logits[0].float()
            found_T_V = self.head.logits(self.model.get_decoder()(input_ids=tokens_1_T, use_cache=False).last_hidden_state[0])
        error = float((expected_T_V - found_T_V).abs().max() / expected_T_V.abs().max().clamp(min=1.0))
        if not error < PROBE_TOLERANCE[self.compute_dtype]:
            raise ShapeError(
                f"{type(self.model).__name__} forms its logits in a way temper does not know",
                why=f"they differ by {error:.2g} from hidden states times head",
                do="use an architecture without logit scaling, or teach it to temper.policy.head.Head",
            )

    # --- adapters ---

    def quantise(self, kind: Quantisation) -> None:
        """Freeze the base and hold its linear layers, the head apart, in four bits: what QLoRA trains adapters beside.

        Raises ConfigError where adapters are here already, MissingDependency without bitsandbytes.
        """
        if self.router.names or self.packed:
            raise ConfigError(f"quantise: {kind} came too late", why="adapters stand on the layers already, or they are packed", do="quantise right after loading")
        self.freeze_base()
        count = pack_layers(self.model, self.model.get_output_embeddings())
        held = sum(weight.numel() * weight.element_size() for weight in self.base_parameters().values())
        log.info("%d linear layers of %s held as %s; the base takes %.1f MiB", count, self.path, kind, held / 2**20)

    @property
    def packed(self) -> bool:
        """Whether the base is held in four bits."""
        return any(weight.dtype is torch.uint8 for weight in self.model.parameters())

    def adapters(self) -> list[str]:
        """The names of the adapters on this policy, sorted."""
        return sorted(self.router.names)

    def add_lora(self, name: str, config: LoraConfig) -> None:
        """Put a fresh adapter on the layers `config` selects and freeze the base. It starts as the identity."""
        self.freeze_base()
        adapters.add_lora(self.model, self.router, self.model.get_output_embeddings(), name, config)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Attach the adapter in `folder` (PEFT's format) as `name` and freeze the base.

        A folder written by temper is verified. Raises DataError where it does not fit, IntegrityError where it changed.
        """
        path = Path(folder)
        if (path / FILES).is_file():
            verify_folder(path)
        require_card(self.tokenizer, path)
        self.freeze_base()
        recorded = peft_format.load_adapter(self.model, self.router, self.model.get_output_embeddings(), name, path)
        found = self.adapter_hash(name)
        if recorded and recorded["adapter_hash"] != found:
            self.remove_adapter(name)
            raise IntegrityError(
                f"the adapter in {path} is not the one that was saved",
                why=f"recorded {recorded['adapter_hash'][:16]}, found {found[:16]}",
                do="restore the folder, or run again the stage that wrote it",
            )
        if recorded and recorded["base_hash"] != self.weights_hash():
            log.warning(
                "adapter %s was trained on base %s, not on %s: what it does here was never measured",
                path,
                recorded["base_hash"][:12],
                self.path,
            )

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write adapter `name` in PEFT's format. A new folder is whole or absent; an existing one is filled."""
        with filled(Path(folder)) as scratch:
            peft_format.save_adapter(
                self.model, self.model.get_output_embeddings(), name, scratch, base=self.path, base_hash=self.weights_hash()
            )
            write_card(self.tokenizer, scratch)

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`."""
        adapters.remove(self.model, self.router, name)

    def adapter_hash(self, name: str) -> str:
        """The content hash of adapter `name`: equal numbers have equal hashes, whatever their name."""
        return adapters.adapter_hash(self.model, name)

    def use(self, names: Sequence[str | None]) -> contextlib.AbstractContextManager[None]:
        """Inside the block row i of a batch goes through adapter `names[i]` (None: the base alone). Raises ConfigError."""
        wanted = {name for name in names if name is not None}
        if wanted and self._merge is not None:
            raise ConfigError(
                f"adapter {self._merge.name!r} is merged into the base", why="rows would go through it as well", do="unmerge first"
            )
        if unknown := wanted - self.router.names:
            raise ConfigError(
                f"there is no adapter {min(unknown)!r}",
                why=f"loaded: {', '.join(self.adapters()) or 'none'}",
                do="load it with load_adapter",
            )
        return self.router.use(names, self.device)

    def merge(self, name: str) -> str:
        """Fold adapter `name` into the base and return the new weights' hash; `unmerge` restores the very bytes."""
        if self._merge is not None:
            raise ConfigError(f"adapter {self._merge.name!r} is merged already", do="unmerge first")
        self._merge = Merge(self.model, name)
        return self.weights_hash()

    def unmerge(self) -> None:
        """Undo `merge`, proved by a checksum (IntegrityError)."""
        if self._merge is None:
            raise ConfigError("no adapter is merged", do="merge one first")
        self._merge.undo()
        self._merge = None

    # --- weights ---

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name, without any adapter's, sorted."""
        return dict(sorted((name, weight) for name, weight in self.model.named_parameters() if ".lora." not in name))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that takes a gradient, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def freeze_base(self) -> None:
        """Stop training the model's own parameters. On a GPU matrices are held in the compute dtype where that is exact.

        A CPU's stay float32, in which it samples.
        """
        for weight in self.base_parameters().values():
            weight.requires_grad_(False)
        if self.device.type == "cuda" and self.compute_dtype is not torch.float32 and self._merge is None:
            hold_frozen(self.model, self.compute_dtype)

    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and float32 bytes of the model's own parameters, sorted by name."""
        return hash_weights(self.base_parameters())

    def save(self, folder: str | Path) -> None:
        """Write a plain transformers checkpoint with tokenizer and template; adapters are left out.

        A new folder is whole or absent; an existing one (the scratch of `whole_folder`) is filled. Raises ConfigError
        for a base in four bits, which is not what it was loaded from.
        """
        if self.packed:
            raise ConfigError("a base held in four bits is not saved", why=f"its weights stand in {self.path} in full", do="save the adapter")
        with filled(Path(folder)) as scratch:
            names = self.base_parameters().keys()
            state = {name: value for name, value in self.model.state_dict().items() if name in names}
            self.model.save_pretrained(scratch, state_dict=state)
            self.tokenizer.save_pretrained(scratch)
            write_card(self.tokenizer, scratch)
            write_json(scratch / IDENTITY, {"weights_hash": self.weights_hash()})

    def clone_reference(self) -> Policy:
        """A frozen copy in evaluation mode, adapters included: what this policy is now stays its reference."""
        clone = copy.copy(self)
        clone.version = 0  # of a policy that was never trained since it came to be
        clone.model, clone.router = copy.deepcopy((self.model, self.router))
        clone.model.eval().requires_grad_(False)
        clone.lean, clone.packing = Lean(clone.model, clone.model.get_decoder()), Packing(clone)
        return clone
