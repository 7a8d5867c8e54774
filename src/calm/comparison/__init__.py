"""Several models side by side, at equal cost of training or as they are."""
