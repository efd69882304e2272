"""Measuring speed and memory."""
