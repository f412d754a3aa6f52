"""Claims of layers that can be run backwards."""
