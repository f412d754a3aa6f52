"""Claims of recurrences and state spaces."""
