"""Optimiser, schedule and the loop over epochs."""
