"""Stages: a model on a window of samples. They know nothing of Beam."""
