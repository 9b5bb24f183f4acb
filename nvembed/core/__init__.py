"""Storage, steps, retries, leases, Ray start-up and the terminal: everything without machine learning."""
