"""The instructions beyond low rank: one module per kind of arithmetic, each with its batched body and its reference."""
