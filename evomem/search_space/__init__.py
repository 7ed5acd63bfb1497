"""Search space: what of a manager may vary; a vector of real numbers for every variant, and back."""
