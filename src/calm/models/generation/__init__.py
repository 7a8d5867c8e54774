"""Generation: prompts, backbone steps, sampling of the next chunk, `generate`, continuous batching."""
