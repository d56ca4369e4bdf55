"""What replaces downloads in a clone: stand-ins for both data sets, and trained weights.

These modules import nothing else of the project. The scripts in `training/` do: two made the
weights, bench.py compares trainings.
"""
