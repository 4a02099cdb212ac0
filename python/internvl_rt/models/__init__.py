"""InternViT, the projector, the decoder and the model that joins them."""
