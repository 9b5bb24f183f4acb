"""Teacher embeddings as shards, and the comparison of a student with its teacher."""
