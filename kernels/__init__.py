"""Batched adapter operations over (rows, plan, tables). Knows nothing of models or HTTP."""
