"""Text -> tokens -> chunks, and the embedded corpus."""
