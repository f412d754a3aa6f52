"""Wireless communication."""
