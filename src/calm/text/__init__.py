"""Text <-> token ids: the same encoding and decoding for training, prompts, scores and the server."""
