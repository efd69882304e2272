"""Folders with a checkpoint: what is in them, and turning one into another."""
