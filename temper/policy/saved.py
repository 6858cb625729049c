"""Checkpoints on disk: read through transformers, verified against what was recorded, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from temper.core.errors import DataError, IntegrityError
from temper.core.storage import FILES, read_json, verify_folder, whole_folder

IDENTITY = "temper.json"  # beside the weights: their hash


def read_checkpoint(path: str | Path, *, verify: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 or all in the bfloat16 of its files, and the tokenizer of a folder or hub name.

    A folder written by temper is verified against its hashes (IntegrityError). Raises DataError where there is no such
    checkpoint or weights are missing from it.
    """
    if verify and (Path(path) / FILES).is_file():
        verify_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model, info = load_model(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a checkpoint that transformers can load",
            why=str(error).splitlines()[0],
            do="give a folder with config.json, weights and tokenizer, or a hub name",
        ) from error
    if info["missing_keys"]:
        raise DataError(
            f"{path} lacks weights of its own architecture",
            why=f"{len(info['missing_keys'])} missing, first {sorted(info['missing_keys'])[0]}",
            do="save the checkpoint again whole; missing weights would be random ones",
        )
    return model, tokenizer


def load_model(path: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as transformers loads it, and what was missing.

    A folder's files in bfloat16 are read as they are: half the memory. Where the model makes numbers of its own in the dtype it is
    loaded in (Gemma's scale of embeddings), it is loaded in float32 all the same, or those would be rounded.
    """
    loaded: Any
    if stored_in_bfloat16(Path(path)):
        loaded = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.bfloat16, output_loading_info=True)
        if all(buffer.dtype is not torch.bfloat16 for buffer in loaded[0].buffers()):
            return loaded[0], loaded[1]
    loaded = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, output_loading_info=True)
    return loaded[0], loaded[1]


def stored_in_bfloat16(folder: Path) -> bool:
    """Whether all numbers in the folder's safetensors files are bfloat16; False where there are none."""
    dtypes: set[str] = set()
    try:
        for file in folder.glob("*.safetensors") if folder.is_dir() else ():
            with safe_open(file, "pt") as held:
                dtypes |= {held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118
    except SafetensorError:  # where it is one of the model's own files, transformers says so
        return False
    return dtypes == {"BF16"}


def check_identity(path: str | Path, weights_hash: Callable[[], str]) -> None:
    """Raise IntegrityError where the folder records another hash of its weights than theirs."""
    identity = Path(path) / IDENTITY
    if not identity.is_file():
        return
    recorded, found = read_json(identity)["weights_hash"], weights_hash()
    if recorded != found:
        raise IntegrityError(
            f"the weights of {path} are not the ones that were saved",
            why=f"recorded {recorded[:16]}, found {found[:16]}",
            do="restore the folder, or run again the stage that wrote it",
        )


def filled(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """Where to write the files of `folder`: itself where it is an unfinished folder, else one that is whole or absent."""
    return contextlib.nullcontext(folder) if folder.is_dir() and not (folder / FILES).is_file() else whole_folder(folder)


def hash_weights(weights: dict[str, nn.Parameter]) -> str:
    """SHA-256 over names, shapes and float32 bytes, in the order given."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
