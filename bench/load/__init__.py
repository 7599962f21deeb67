"""Load on any server that speaks the OpenAI protocol: workloads, clients, measures."""
