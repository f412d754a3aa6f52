"""Learning rules without end-to-end backpropagation."""
