"""Layer 5: teacher vectors to shards, and the student that learns from them."""
