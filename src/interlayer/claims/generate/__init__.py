"""Claims of diffusion and flow."""
