"""Contents of a checkpoint: configurations, autoencoder, heads and language model."""
