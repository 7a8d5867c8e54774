"""Writing text: prompts, the backbone step by step, draws of the next chunk, `generate`, batches."""
