"""Encoders: models that turn one modality into vectors. `families` is the one place where a new family goes."""
