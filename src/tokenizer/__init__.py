"""Text to token ids and back, whichever files a model's vocabulary lies in. Shared by frontends and ranks; no torch."""

from shoal.tokenizer.parts import TokenizerParts
from shoal.tokenizer.tokenizer import TextStream, Tokenizer, load_tokenizer

__all__ = ["TextStream", "Tokenizer", "TokenizerParts", "load_tokenizer"]
