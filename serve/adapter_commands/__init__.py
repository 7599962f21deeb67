"""``onebase adapters``: a client of the adapter routes, and work on folders without a server."""
