"""The key-value cache of a model, kept off where documents are packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turn the key-value cache off: with it, transformers lets packed documents see one another.

    The configuration is left as it was found, for whoever generates with the model.
    """
    config: Any = model.config
    missing = object()
    before = vars(config).get("use_cache", missing)
    config.use_cache = False
    try:
        yield
    finally:
        if before is missing:
            del config.use_cache
        else:
            config.use_cache = before
