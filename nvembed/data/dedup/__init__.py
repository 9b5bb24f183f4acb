"""Near duplicates, contained texts and decontamination."""
