"""Benchmarks. Each prints both sides of the comparison it makes."""
