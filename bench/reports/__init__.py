"""What becomes of stored figures: pages, summaries, comparisons, docs/benchmarks.md. Measures nothing itself."""
