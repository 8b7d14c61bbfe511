"""Hidden states of a cache: encoded, projected, measured, and read by chunks."""
