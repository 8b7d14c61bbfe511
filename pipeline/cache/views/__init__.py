"""Rows of finished caches that are read as one cache."""
