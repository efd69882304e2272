"""Judging answers: questions with references, what is right, how sure that is."""
