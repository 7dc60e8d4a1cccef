"""What a person sees of a run: its progress while it works and its summary at the end."""
