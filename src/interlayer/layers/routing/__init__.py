"""Experts and branches: layers that choose which parameters an input meets."""
