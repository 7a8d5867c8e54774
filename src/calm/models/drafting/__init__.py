"""Speculative decoding: a CALM drafts and another model verifies, in fewer steps (docs/drafting.md)."""
