"""Answering several people at once."""
