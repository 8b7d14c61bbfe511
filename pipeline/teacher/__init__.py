"""The teacher: loaded once, asked in batches, its answers made sparse where they arise.

TeacherConfig -- load --> Teacher -- capture(inputs) --> Captured -- examples() --> CachedExample
"""

from pipeline.teacher.background import Background, map_in_order, one_thread_each
from pipeline.teacher.captured import Captured
from pipeline.teacher.content import describe_writing, read_settings
from pipeline.teacher.keeping import CaptureSpec
from pipeline.teacher.loading import TeacherConfig, describe_files, load_settings, load_tokenizer
from pipeline.teacher.model import Teacher
from pipeline.teacher.packing import require_isolation
from pipeline.teacher.spool import Spool

__all__ = [
    "Background",
    "CaptureSpec",
    "Captured",
    "Spool",
    "Teacher",
    "TeacherConfig",
    "describe_files",
    "describe_writing",
    "load_settings",
    "load_tokenizer",
    "map_in_order",
    "one_thread_each",
    "read_settings",
    "require_isolation",
]
