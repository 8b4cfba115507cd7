"""What a run did: summaries and pictures."""
