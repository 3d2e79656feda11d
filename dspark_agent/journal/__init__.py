"""Durable runs: a journal of what the model wrote and what the tools returned."""
