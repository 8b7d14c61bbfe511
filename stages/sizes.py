"""The sections `batch` and `shard` of a cache's config: how much is asked, and written, at once."""

from typing import Annotated

from pydantic import Field

from pipeline.capture import bytes_per_token
from pipeline.config import StrictModel
from pipeline.teacher import CaptureSpec, Spool, Teacher

_SHARD_BYTES = 1 << 29  # answers of a shard in memory, before they are encoded


class BatchConfig(StrictModel):
    """How much the teacher is asked at once.

    Attributes:
        tokens: of a batch, padding included; by default 2,048 on a CPU, 8,192 on a GPU.
        workers: batches at a time; by default one for every core of a CPU, one on a GPU.
    """

    tokens: Annotated[int, Field(gt=0)] | None = None
    workers: Annotated[int, Field(gt=0)] | None = None

    def resolve(self, teacher: Teacher) -> tuple[int, int]:
        """Tokens and workers for a teacher, where its device decides them too.

        A core's own batch is small because a larger one leaves its cache.
        """
        tokens = self.tokens or (2048 if teacher.device.type == "cpu" else 8192)
        return tokens, self.workers or teacher.workers


class ShardConfig(StrictModel):
    """The unit of work: about so many tokens, fewer where hidden states are large, or examples."""

    tokens: int = Field(default=1 << 18, gt=0)
    examples: Annotated[int, Field(gt=0)] | None = None

    def count(self, spec: CaptureSpec, width: int, spool: Spool) -> int:
        """Examples of a shard.

        Args:
            width: D of the teacher.
        """
        if self.examples is not None:
            return self.examples
        tokens = min(self.tokens, max(1, _SHARD_BYTES // bytes_per_token(spec, width)))
        return max(1, tokens * len(spool) // max(1, sum(spool.lengths)))
