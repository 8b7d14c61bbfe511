"""Properties are checked on the same cases in every run, however busy the machine is."""

from hypothesis import settings

settings.register_profile("stillroom", deadline=None, derandomize=True)
settings.load_profile("stillroom")
