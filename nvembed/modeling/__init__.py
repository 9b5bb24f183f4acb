"""Layer 2: the bidirectional LLM embedder, its pooling, and the model folder."""
