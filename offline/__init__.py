"""What replaces the network in a clone: stand-ins for both data sets, and trained weights.

Nothing here imports the rest of the project; `training/` holds the scripts that made the weights.
"""
