"""Pure tensor kernels, on any device, batched: no I/O and no state."""
