"""How `models/visualglm-tiny` is made."""
