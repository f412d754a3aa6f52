"""Weights written by hand."""
