"""The procedural corpus: pictures, sounds and short texts whose right caption is known.

`mmbeam demo` writes it as shards and the shipped fusion model is trained on it. A picture shows one or
two shapes; a sound of one second is a tone, a chirp or a noise; a tag names a place and a time, which
neither shows. It is made to be told apart, not to be natural: what is learned from it says nothing
about photographs.
"""

from mmbeam.corpus.render import render_audio, render_batch, render_image
from mmbeam.corpus.scene import VOCABULARY, Scene, Shape, Sound, generate_scenes, tag
from mmbeam.corpus.write import write_corpus

__all__ = [
    "VOCABULARY",
    "Scene",
    "Shape",
    "Sound",
    "generate_scenes",
    "render_audio",
    "render_batch",
    "render_image",
    "tag",
    "write_corpus",
]
