"""First number of every seed that the embedded suites draw from, so that no two uses of their generators draw alike."""

TRAINING, SAMPLES, CHECKS = 0, 1, 2
"""A recipe's batches, what a suite's ``samples()`` gives, and a recipe's held-out checks."""
