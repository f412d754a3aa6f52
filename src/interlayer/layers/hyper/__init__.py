"""Networks whose weights another network generates."""
