"""CPU kernels in C, compiled once for the machine at hand. Without a compiler their plain twins serve."""
