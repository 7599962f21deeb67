"""Calls of tools in what a model writes: their formats, how they are read as they come, how they are forced."""
