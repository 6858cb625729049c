"""Traces: what people already have (chat logs, question files, pairs, our own records) in and out of `Record`."""
