"""Whether a cache is what it was written as, and what to write again where it is not."""
