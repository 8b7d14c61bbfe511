"""Who works on a cache."""
