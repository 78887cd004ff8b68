"""What figures and tables share."""
