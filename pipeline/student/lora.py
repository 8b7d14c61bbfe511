"""Students that learn by adapters of low rank, and are whole again in the end.

model -> add_adapters: frozen weights + A·B beside chosen layers -> training -> merge_adapters
"""

import warnings
from pathlib import Path
from typing import Any

import transformers
from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import ConfigError

# Heads that a checkpoint may lack learn as a whole; peft knows them by the kind of task.
_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
_ADAPTER = "adapter"  # the folder in a run's folder


class LoRA(StrictModel):
    """Low-rank adaptation (Hu et al. 2022), by the library peft.

    Attributes:
        r: the rank of each update.
        alpha: the update is scaled by alpha / r.
        target_modules: ends of the names of the layers that are adapted, or "all-linear"; those
            that peft knows for the architecture where left out.
        dropout: of what an adapter reads.
        train_modules: ends of the names of modules that learn as a whole, for instance a new head.
        keep_adapter: write the adapter beside the merged student too.
    """

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    target_modules: list[str] | str | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    train_modules: list[str] | None = None
    keep_adapter: bool = False

    def adapt(self, model: transformers.PreTrainedModel, auto_class: str) -> "Adapters":
        """Freeze the model and put adapters beside its layers, in place.

        Args:
            auto_class: the transformers Auto class of its task; the head of a classifier learns.

        Raises:
            ConfigError: peft is not installed, or no layer has such a name.
        """
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                'student.lora needs peft; pip install "stillroom[lora]", or leave it out'
            ) from error
        settings = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            target_modules=self.target_modules,
            lora_dropout=self.dropout,
            modules_to_save=self.train_modules,
            task_type=_TASK_TYPES.get(auto_class),
        )
        try:
            with warnings.catch_warnings():  # peft asks transformers by a name of before
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                return Adapters(peft.get_peft_model(model, settings), self.keep_adapter)
        except ValueError as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"student.lora.target_modules: {first}") from error


class Adapters:
    """The adapters of a model, while it trains."""

    def __init__(self, adapted: Any, keep: bool) -> None:
        self._adapted, self._keep = adapted, keep

    def merge(self, output: Path, writes: bool) -> None:
        """Add the updates to the weights; the model has its own layers again.

        Args:
            output: the run's folder, which gets the adapter where it is kept.
            writes: whether this process is the one that writes.
        """
        if self._keep and writes:
            self._adapted.save_pretrained(output / _ADAPTER)
        self._adapted.merge_and_unload()
