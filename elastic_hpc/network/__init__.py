"""Authenticated connections between agents, and the leader behind them. Start with ``session``."""
