"""What all tests share: reproducible properties, and an object store of the session."""

from hypothesis import settings
from small_store import bucket, store  # noqa: F401

settings.register_profile("stillroom", deadline=None, derandomize=True)
settings.load_profile("stillroom")
