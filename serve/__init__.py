"""The server: base model, engine, HTTP API, command line."""
