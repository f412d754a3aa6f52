"""New tasks at low cost."""
