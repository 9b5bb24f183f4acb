"""The model registry: versions of model folders with scores, chain and licences; the gate; promotion."""
