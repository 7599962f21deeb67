"""The small base model and adapters that `onebase demo` serves."""
