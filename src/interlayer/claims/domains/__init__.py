"""Claims of the wing domains."""
