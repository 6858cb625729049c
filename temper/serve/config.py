"""How a release is served; configs/serve.yaml spells it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from temper.core.config import Config


class ServeConfig(Config):
    """One server: what it serves, where it listens, what it writes down, and its limits.

    `constrain_tools` says when a grammar guarantees valid tool calls: always where tools are offered, only for tools
    marked strict, or never. `keep_prefixes` reuses computed prompts between requests of one tenant: faster for long
    conversations, but equal requests then agree to rounding only. `override_deprecation` serves a release past its last day.
    """

    registry: Path = Path("runs/registry")
    alias: str = "production"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    audit: Path = Path("runs/serve/audit.jsonl")
    capture: Path | None = None
    capture_licence: str = "internal"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    max_rows: int = Field(default=64, ge=1)
    keep_prefixes: bool = False
    max_waiting: int = Field(default=1024, ge=1)
    gather_ms: float = Field(default=3.0, ge=0)
    poll_seconds: float = Field(default=1.0, gt=0)
    look_for_client_seconds: float = Field(default=0.5, gt=0)
    default_max_tokens: int = Field(default=256, ge=1)
    max_body_bytes: int = Field(default=4_000_000, ge=1)
    constrain_tools: Literal["always", "strict", "never"] = "always"
    override_deprecation: bool = False
