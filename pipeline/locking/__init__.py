"""Who works in a folder: on a cache, on a run."""
