"""Recipes, and the Hugging Face Trainer around our models."""
