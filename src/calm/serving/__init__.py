"""An OpenAI-compatible server in which concurrent requests share batches."""
