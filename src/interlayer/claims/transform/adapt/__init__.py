"""Claims of ways to adapt."""
