"""What is done to a trained model."""
