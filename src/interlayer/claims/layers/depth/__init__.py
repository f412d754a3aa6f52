"""Claims of dynamic depth."""
