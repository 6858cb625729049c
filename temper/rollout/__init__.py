"""Sampling: environments, tools, retrieval and verifiers; the engine, grammars and episodes."""
