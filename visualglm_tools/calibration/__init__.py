"""Better codes for a checkpoint, with prompts of the user's own."""
