"""Video tokenizer (HBQ autoencoder) and text encoder."""
