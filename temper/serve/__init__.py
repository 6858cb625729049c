"""Serving a release: an OpenAI-compatible API, told apart by tenant, with an audit line for every request."""

from temper.serve.app import create_app
from temper.serve.config import ServeConfig
from temper.serve.server import app_for, chat, serve, serve_config, serving

__all__ = ["ServeConfig", "app_for", "chat", "create_app", "serve", "serve_config", "serving"]
