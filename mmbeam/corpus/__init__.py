"""The procedural corpus: images, audio and short texts with known captions.

`mmbeam demo` writes it as shards, and the shipped fusion model is trained on it. The image shows one or two shapes. The
audio is one second of a tone, a chirp or noise. The text names a place and a time, which neither image nor audio shows.
The content is distinguishable, not natural: results do not carry over to photographs.
"""
