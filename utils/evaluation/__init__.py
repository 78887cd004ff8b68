"""From a trained network to predictions, thresholds, curves and early exit."""
