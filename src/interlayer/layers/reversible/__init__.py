"""Layers that can be run backwards."""
