"""nvembed: from raw text mixtures to a registered embedding model and its distilled students."""

__version__ = "0.1.0"
