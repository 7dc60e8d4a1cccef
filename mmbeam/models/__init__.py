"""Models: their files, their devices, and the families of encoders, generators and fusion models."""
