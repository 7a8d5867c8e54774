"""The Hugging Face hub, and folders in its form: what is loaded from either."""
