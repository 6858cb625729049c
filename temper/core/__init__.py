"""Nouns, config, storage, statistics and errors that every room shares."""
