"""Prompts: templates over a sample, and the turns of a dialogue."""
