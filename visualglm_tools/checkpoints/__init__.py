"""Checkpoints on disk: reading, checking, loading, converting, quantizing, merging."""
