"""Quantum networks and circuits."""
