"""The training stream: sampling, layout, joined texts, reader."""
