"""Backbones: what models call things, how they store them, and the seams of their sequences."""

from deltatune.backbones import roles, storage, virtual_tokens

__all__ = ["roles", "storage", "virtual_tokens"]
