"""Vectors on disk: their schema, their files, their rows as samples, and the torch loader."""
