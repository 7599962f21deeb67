"""The HTTP surface: OpenAI routes, adapter routes, errors, streaming."""
