"""Several models side by side, at equal training cost or as they are."""
