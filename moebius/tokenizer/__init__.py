"""Text to token ids and back, and chat templates: what a model folder's tokenizer files say, without transformers."""

from moebius.tokenizer.encoding import BatchEncoding
from moebius.tokenizer.tokenizer import AutoTokenizer, Tokenizer

__all__ = ["AutoTokenizer", "BatchEncoding", "Tokenizer"]
