"""Errors that say what went wrong, why, and what to do about it, with the values.

Every error a user can cause derives from `TemperError`; the command line prints it without a
traceback and exits with code 2. Anything else is a programming error and keeps its traceback.
"""

from __future__ import annotations


class TemperError(Exception):
    """`what` happened, `why` it is wrong, and what to `do`."""

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = what, why, do
        super().__init__("\n".join(part for part in (what, why and f"  why: {why}", do and f"  do:  {do}") if part))


class ConfigError(TemperError, ValueError):
    """A config file or override that does not spell a valid config."""


class DataError(TemperError, ValueError):
    """A record, row or file that cannot be used as data."""


class TemplateError(DataError):
    """A chat template that breaks the contract between training and serving."""


class ManifestError(DataError):
    """Data that is not, or no longer, what its manifest says was admitted."""


class IntegrityError(TemperError):
    """Bytes on disk that differ from their recorded hash, or an artefact that was torn."""


class ShapeError(TemperError, ValueError):
    """Tensors whose axes do not agree."""


class MissingDependency(TemperError, ImportError):
    """An optional extra that this step needs and this machine lacks."""


class DeviceError(TemperError, RuntimeError):
    """A device or precision that was asked for and is not here."""


class ReleaseError(TemperError):
    """A release operation that the registry refuses."""


class StorageError(TemperError, OSError):
    """The disk is full or cannot be written."""
