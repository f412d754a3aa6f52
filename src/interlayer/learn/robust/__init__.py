"""Learning under noise and attack."""
