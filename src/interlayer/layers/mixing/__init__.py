"""Mixing of tokens and channels."""
