"""Layer 4: hard negatives: pure selection rules, the step that runs them, the audit."""
