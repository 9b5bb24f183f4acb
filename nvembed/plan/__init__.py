"""The arithmetic of a run before it runs: batches, parameters, memory, work, storage, hours (layer 6)."""
