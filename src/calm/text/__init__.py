"""Text <-> token ids: one reading and one spelling for training, prompts, scores and the server."""
