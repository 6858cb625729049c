"""One command of `temper` as a process of its own, forked from a server that has imported what is slow to import."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = ["child", "temper.cli", "temper.train.sft", "temper.pipeline.data", "temper.rollout.engine"]


class Told(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def work(arguments: list[str], folder: str, absent: str | None, file_limit: int | None) -> None:
    """Run the command with its streams in `folder`; `absent` is a package that cannot be imported, `file_limit` bytes of any file."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if absent:
        sys.modules[absent] = None  # type: ignore[assignment]
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    from temper.cli import main

    torch.set_num_threads(1)
    main(arguments)


def temper(folder: Path, *arguments: Any, absent: str | None = None, file_limit: int | None = None) -> Told:
    """Run `temper` with `arguments`; its streams are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    process = server.Process(target=work, args=([str(item) for item in arguments], str(folder), absent, file_limit))
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return Told(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())
