"""AdaQAT: bit-widths that are learned while the network is trained (Gernigon et al., 2404.16876)."""

from fastqat.adaqat.bit_width import BitWidth
from fastqat.adaqat.history import Update
from fastqat.adaqat.search import AdaQAT

__all__ = ["AdaQAT", "BitWidth", "Update"]
