"""Diffusion and flow."""
