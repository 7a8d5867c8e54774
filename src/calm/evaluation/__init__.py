"""Scores on held-out text: BrierLM, perplexity, reconstruction, n-gram floors, and answers to prompts."""
