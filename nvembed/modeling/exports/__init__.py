"""Other forms of a finished model, each compared with the model folder it comes from."""
