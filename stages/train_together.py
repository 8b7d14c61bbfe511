"""Train several students in one pass over the stream: each batch is read and decoded once for all.

configs -> do they read alike? -> a thread each, in turns -> folders
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.arguments import training_arguments
from pipeline.errors import ConfigError
from pipeline.identity import digest_tokenizer
from pipeline.lockstep import run_in_turns
from pipeline.student import own_tokenizer
from stages.quiet import quiet_libraries
from stages.train_student import StudentConfig, train_student

_READ = ("cache", "inputs", "sampling", "max_examples")
_TAKEN = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "seed",
    "bf16",
    "fp16",
)


@quiet_libraries()
def train_together(configs: Sequence[StudentConfig]) -> list[Path]:
    """Train students side by side; each gets the weights that it would have got alone.

    All are in memory at a time; what differs (size, losses, learning rate, steps) is free.

    Raises:
        ConfigError: they do not read the same batches, or by worker processes.
        StillroomError: as `train_student`, of any; the others stop and can be continued.
    """
    told = [_describe_batches(config) for config in configs]
    for config, one in zip(configs, told, strict=True):
        for name, value in one.items():
            if value != told[0][name]:
                raise ConfigError(
                    f"{config.output}: {name} is {value}, that of {configs[0].output} is"
                    f" {told[0][name]}; students trained together read the same batches"
                )
    if told[0]["training.dataloader_num_workers"]:
        raise ConfigError(
            "training.dataloader_num_workers: a worker process would read for one student alone;"
            " leave it out where students are trained together"
        )
    jobs = [partial(train_student, config) for config in configs]
    return run_in_turns(jobs, keep=told[0]["training.gradient_accumulation_steps"])


def _describe_batches(config: StudentConfig) -> dict[str, Any]:
    """All that decides which batches a student reads, and the precision it computes in."""
    settings = {"seed": config.seed, **config.training}
    training = training_arguments(settings, config.evaluation, config.output)
    whole, tokenizer = config.model_dump(mode="json"), own_tokenizer(config.student)
    return {
        **{name: whole[name] for name in _READ},
        "tokenizer": "the cache's" if tokenizer is None else digest_tokenizer(tokenizer),
        **{f"training.{name}": getattr(training, name) for name in _TAKEN},
    }
