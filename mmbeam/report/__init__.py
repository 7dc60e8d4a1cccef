"""Texts about a run: its inputs, its progress, its status and its summary."""
