"""Layer 3: encoding in Ray Data actors, exact search, BM25; shared by mining, evaluation and distillation."""
