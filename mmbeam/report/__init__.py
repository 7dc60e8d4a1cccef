"""Text about a run: its inputs before, its progress during, its status and summary after."""
