"""The engine: schedule -> plan -> forward -> sample -> deliver, in a process of its own."""
