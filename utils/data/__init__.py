"""Reading, splitting, ordering and augmenting images."""
