"""The procedural corpus: images, audio and short texts with known captions.

`mmbeam demo` writes it as shards, and the shipped fusion model is trained on it. An image shows one or two
shapes; one second of audio is a tone, a chirp or noise; a tag names a place and a time, which appear in
neither. The content is made to be distinguishable, not natural: results on it do not carry over to
photographs.
"""
