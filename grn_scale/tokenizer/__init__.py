"""Video tokenizer (HBQ autoencoder) and text encoder."""

from grn_scale.tokenizer.load import load_tokenizer

__all__ = ["load_tokenizer"]
