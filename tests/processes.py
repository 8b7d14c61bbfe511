"""Real processes for tests: one imports the house once, and the others are forked from it."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["stages.cache_teacher"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "t5")]
)
