"""The embedded default environment: a financial operations assistant over real SQLite ledgers."""

from temper.environments.finops.environment import FinopsEnvironment, environment

__all__ = ["FinopsEnvironment", "environment"]
