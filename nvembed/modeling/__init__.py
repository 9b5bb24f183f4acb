"""The bidirectional LLM embedder, its pooling, and the model folder."""
