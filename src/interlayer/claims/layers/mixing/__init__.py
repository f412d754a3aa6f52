"""Claims of this room."""
