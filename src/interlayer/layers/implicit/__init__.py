"""Layers defined by an equation."""
