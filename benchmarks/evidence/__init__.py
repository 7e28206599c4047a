"""What the methods reach on real data, with the same steps and the same tuning for each."""
