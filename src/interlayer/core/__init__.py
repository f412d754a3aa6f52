"""The primitives. Nothing here knows a paper."""
