"""Texts: instructions (the only home of prompts), tokenising with the instruction mask, token-budget batching."""
