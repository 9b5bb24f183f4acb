"""Other forms of a finished model, each measured against the model folder it came from (layer 2)."""
