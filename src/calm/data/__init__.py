"""Text -> tokens -> blocks of chunks, and the embedded corpus."""
