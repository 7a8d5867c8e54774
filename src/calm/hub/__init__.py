"""Loading from the Hugging Face hub, and from folders in its format."""
