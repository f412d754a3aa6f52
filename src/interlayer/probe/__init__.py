"""How a model is looked into."""
