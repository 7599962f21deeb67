"""The same workload on several servers: ours, Hugging Face PEFT behind a minimal batcher, and whoever is installed."""
