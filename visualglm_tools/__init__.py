"""What people install and type: the command `visualglm` and what its parts are made of."""
