"""Sharing a model: a card written from its run, a smaller copy, and upload to the hub."""

from calm.sharing.cards import write_card
from calm.sharing.publishing import check_export, check_push, export, push

__all__ = ["check_export", "check_push", "export", "push", "write_card"]
