"""Dynamic depth."""
