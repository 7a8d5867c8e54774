"""Scores on held-out text: BrierLM, reconstruction, and the n-gram floor."""
