"""A CALM writes ahead, and another language model decides: its text, in fewer steps (docs/drafting.md)."""
