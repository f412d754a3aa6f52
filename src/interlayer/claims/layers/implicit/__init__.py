"""Claims of layers defined by an equation."""
