"""The plan of a run before it starts: batches, parameters, memory, operations, storage, hours."""
