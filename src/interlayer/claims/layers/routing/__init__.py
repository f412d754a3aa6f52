"""Claims of routed experts."""
