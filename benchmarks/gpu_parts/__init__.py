"""The parts of `benchmarks/gpu.py`, each a process of its own: what one holds of the card is free
again when it ends."""
