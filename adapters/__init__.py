"""What an adapter is and where it lives. Knows nothing of HTTP or scheduling."""
