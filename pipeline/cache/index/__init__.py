"""Found without reading a shard: rows of ids, of splits, of values, and what stands in them."""
