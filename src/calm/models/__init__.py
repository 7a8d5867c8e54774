"""What a checkpoint is: configurations, autoencoder, heads and language model."""
