"""The content-addressed store: one whole, read-only folder for each artefact, named by its hash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from temper.core.errors import DataError, IntegrityError
from temper.core.storage import FILES, disk_errors, verify_folder, whole_folder


class Store:
    """Folders under `root`, each at `root/<sha256 of its recorded hashes>/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, digest: str) -> Path:
        """Where the artefact of that hash stands."""
        return self.root / digest

    def add(self, source: Path, *, link: bool = False) -> str:
        """Verify `source` against its own hashes, take it in, and return its hash.

        Files are copied, so that later edits of `source` cannot reach a release; `link` makes hard links
        instead (large weights on one disk, whose owner promises not to edit in place). Adding twice keeps one.
        """
        if not source.is_dir():
            raise DataError(
                f"{source} is not a folder", why="an artefact is a folder with its FILES.json", do="give the output folder of a stage"
            )
        digest = verify_folder(source)
        target = self.folder(digest)
        if target.is_dir() and self._whole(digest):
            return digest
        with whole_folder(target) as scratch, disk_errors(target):
            for item in sorted(source.rglob("*")):
                relative = item.relative_to(source)
                if not item.is_file() or relative.as_posix() == FILES:
                    continue
                (scratch / relative).parent.mkdir(parents=True, exist_ok=True)
                if link:
                    os.link(item.resolve(), scratch / relative)
                else:
                    shutil.copyfile(item, scratch / relative)
                    (scratch / relative).chmod(0o444)
        self.verify(digest)
        return digest

    def verify(self, digest: str) -> Path:
        """The folder of `digest`, after reading every byte. Raises IntegrityError where it is absent or differs."""
        path = self.folder(digest)
        if not path.is_dir():
            raise IntegrityError(
                f"artefact {digest[:16]} is not in the store",
                why=f"{path} does not exist",
                do="register the release again from its run folder",
            )
        found = verify_folder(path)
        if found != digest:
            raise IntegrityError(
                f"{path} is not what its name says",
                why=f"named {digest[:16]}, found {found[:16]}",
                do="remove the folder and register the release again",
            )
        return path

    def _whole(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except IntegrityError:
            return False
        return True
