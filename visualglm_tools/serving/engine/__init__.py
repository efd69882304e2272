"""The queue, the model and the pictures behind every door that serves."""
