"""The parts of the command `visualglm`: each parses options, calls, and renders."""
