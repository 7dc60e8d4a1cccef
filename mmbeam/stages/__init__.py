"""Stages: a model applied to a window of samples, independent of Beam."""
