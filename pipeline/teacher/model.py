"""One forward pass without gradients, and what is kept of it.

    inputs -> model once, without its head -> head on chunks of target positions -> sparse_targets
           -> chosen layers at feature positions, pooled vector -> copy to the CPU -> Captured

The head never sees more positions than make a chunk of bounded size, so no [B, T, V] tensor in
float32 exists. The pooled vector is the mean of the last hidden states (after the final norm where
the model has one) over the tokens of an example, not normalised, unless the task says otherwise.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.attention import model_depth, watch_attention
from pipeline.errors import ConfigError, ModelError
from pipeline.examples import Example
from pipeline.heads import OutputHead, head_input
from pipeline.targets import Targets
from pipeline.teacher.captured import Captured
from pipeline.teacher.content import describe_model
from pipeline.teacher.keeping import CaptureSpec, keep_states, select, send
from pipeline.teacher.loading import TeacherConfig, load_model
from pipeline.teacher.packing import drop_unknown
from pipeline.teacher.sparse import sparse_targets
from pipeline.teacher.stopwatch import Stopwatch

_LOG = logging.getLogger(__name__)
# Elements of float32 logits: made by the head at once, and searched at once. On a CPU the
# latter should fit into a core's share of the cache, the former be enough rows to read the weights
# for; an allocation above 32 MB is mapped afresh every time.
_CPU_CHUNK, _CPU_BLOCK = 1 << 22, 1 << 20
_GPU_CHUNK = 1 << 26


class Asked(Protocol):
    """What a teacher must know of the task that it is asked; every `Task` is one."""

    auto_class: ClassVar[str]
    vocabulary: ClassVar[bool]

    @property
    def label_names(self) -> list[str] | None: ...
    def model_inputs(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def logits(self, outputs: Any, inputs: dict[str, Tensor]) -> Tensor: ...
    def hidden_states(self, outputs: Any) -> Sequence[Tensor]: ...
    def equip(self, model: Any, name: str | None = None, revision: str | None = None) -> None: ...
    def pool(self, model: Any, last: Tensor, token_mask: Tensor) -> Tensor: ...


class Teacher:
    """A frozen model that answers batches.

    Attributes:
        model: the transformers model, on its device.
        num_classes: V.
        num_layers: L, of the decoder where there is one beside an encoder; hidden states have the
            indices 0 (embeddings) to L.
        width: D.
        head: the output head of a language model; None where the whole model gives the logits.
        task: says where in the model's outputs logits and hidden states are.
        forward: how long the model itself took, the head included.
        chunk_elements: float32 logits held at a time.
        block_elements: logits whose top-k and sums are taken at a time.
    """

    def __init__(self, model: Any, task: Asked, num_classes: int) -> None:
        """Wrap a loaded model.

        Args:
            model: in evaluation mode.
            task: what it is asked.
            num_classes: V.

        Raises:
            ModelError: the model gives fewer logits than there are classes.
        """
        self.model = model
        self.name = str(model.name_or_path or type(model).__name__)
        self.num_classes = num_classes
        text = model.config.get_text_config()
        self.num_layers = model_depth(text)
        self.width = int(text.hidden_size)
        self.task = task
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.forward = Stopwatch(self.device)
        on_cpu = self.device.type == "cpu"
        self.chunk_elements = _CPU_CHUNK if on_cpu else _GPU_CHUNK
        self.block_elements = _CPU_BLOCK if on_cpu else _GPU_CHUNK
        self.head = _find_head(model, num_classes) if task.vocabulary else None

    @classmethod
    def load(
        cls,
        config: TeacherConfig,
        task: Asked,
        num_classes: int,
    ) -> "Teacher":
        """Load a teacher for a task; see `load_model` and `__init__` for arguments and errors."""
        model = load_model(config, task.auto_class, task.label_names)
        task.equip(model, config.model, config.revision)
        return cls(model, task, num_classes)

    @property
    def workers(self) -> int:
        """Batches that it can be asked at a time: one per core on a CPU, else one.

        A small batch on each core is faster than a large one spread over all of them. A model that
        is moved in and out while it runs answers one at a time.
        """
        moved = len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) > 1
        return 1 if moved or self.device.type != "cpu" else torch.get_num_threads()

    def twin(self) -> "Teacher":
        """The same tensors under modules of its own, for another thread: a module may put others
        in their place between calls, as rotary tables do that grow."""
        twin = copy.copy(self)
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        twin.model = copy.deepcopy(self.model, shared)
        return twin

    def identity(self) -> dict[str, Any]:
        """What the model is by content, JSON values; see `describe_model`."""
        return {**describe_model(self.model), "layers": self.num_layers, "width": self.width}

    def name_layers(self, layers: Sequence[int]) -> dict[str, int]:
        """Signal names `layer.<i>` and indices of chosen layers; negative ones count from the last.

        Raises:
            ConfigError: the teacher has no such layer.
        """
        found = {}
        for layer in layers:
            index = layer + self.num_layers + 1 if layer < 0 else layer
            if not 0 <= index <= self.num_layers:
                raise ConfigError(
                    f"hidden.layers: {self.name} has no layer {layer}; it has 0 (embeddings) to"
                    f" {self.num_layers}, or -{self.num_layers + 1} to -1"
                )
            found[f"layer.{index}"] = index
        return found

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model can read, None where its config does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return None
        for name, module in self.model.named_modules():
            offset = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and offset is not None:
                return limit - int(offset) - 1  # RoBERTa numbers positions from padding_idx + 1
        return limit

    @torch.no_grad()
    def capture(
        self,
        inputs: Mapping[str, Tensor],
        target_index: Tensor,
        feature_index: Tensor,
        examples: Sequence[Example],
        spec: CaptureSpec,
        generator: torch.Generator | None = None,
    ) -> Captured:
        """Ask the teacher about a batch; on a GPU this returns before the answers are there.

        Args:
            inputs: what the model is called with, [B, T] each.
            target_index: [N] flat positions b * T + t that get targets (b for a sequence task).
            feature_index: [M] flat positions whose hidden states are kept.
            examples: the B examples.
            spec: what is kept.
            generator: of the tail draws, on the teacher's device.
        """
        known = drop_unknown(self.model, inputs)
        put = {name: send(tensor, self.device) for name, tensor in known.items()}
        labels = torch.cat([torch.from_numpy(e.label_ids).long() for e in examples])
        with self.forward, watch_attention(self.model, spec.attention) as attention:
            rows, states = self._run(put, spec)
        targets = self._sparse(select(rows, target_index), labels, spec, generator)
        hidden = keep_states(rows, states, attention, feature_index, spec)
        if spec.pooled:
            mask = send(_token_mask(examples, states[-1]), states[-1].device)
            hidden["pooled"] = self.task.pool(self.model, states[-1], mask)
        features = [0] * len(examples)
        if spec.layers or spec.attention or spec.head:
            widths = [vectors.shape[1] for vectors in (*states, *attention.values())]
            width = widths[0] if widths else len(rows) // len(examples)
            features = _count_by_row(feature_index, width, len(examples))
        return Captured.start_copy(targets, hidden, examples, features)

    def _run(self, inputs: dict[str, Tensor], spec: CaptureSpec) -> tuple[Tensor, Any]:
        """What the logits are made from, by row (what the head is given, where there is one), and
        hidden states."""
        wanted = {"output_hidden_states": True} if spec.needs_states else {}
        known = self.task.model_inputs(self.model, inputs)
        if self.head is None:
            outputs = self.model(**known, **wanted)
            rows = self.task.logits(outputs, inputs)
        else:
            with head_input(self.model) as seen:
                outputs = self.model(**known, **wanted)
            rows = seen[0].flatten(0, -2)
        return rows, self.task.hidden_states(outputs) if wanted else ()

    def _sparse(
        self, rows: Tensor, labels: Tensor, spec: CaptureSpec, generator: torch.Generator | None
    ) -> Targets:
        """Targets of [N, D] hidden states or [N, V] logits, chunk by chunk."""
        step = max(1, self.chunk_elements // self.num_classes)
        block = max(1, self.block_elements // self.num_classes)
        labels = send(labels, self.device)
        parts = []
        for start in range(0, max(len(rows), 1), step):
            with self.forward:
                chunk = rows[start : start + step]
                logits = chunk if self.head is None else self.head(chunk)
            z = logits[:, : self.num_classes].to(self.device)
            asked = labels[start : start + step]
            parts += [
                sparse_targets(
                    z[first : first + block],
                    spec.top_k,
                    spec.tail_draws,
                    spec.temperatures,
                    asked[first : first + block],
                    generator,
                )
                for first in range(0, max(len(z), 1), block)
            ]
        return Targets.cat(parts) if len(parts) > 1 else parts[0]


def _find_head(model: Any, num_classes: int) -> OutputHead | None:
    """The head of a language model; None, said once, where the whole model must give the logits."""
    rows = int(model.config.get_text_config().vocab_size)
    if rows < num_classes:
        raise ModelError(
            f"{model.name_or_path}: gives {rows:,} logits, the tokenizer has {num_classes:,} ids;"
            " use the tokenizer that the model was trained with"
        )
    try:
        return OutputHead.of(model, num_classes)
    except ModelError as error:
        _LOG.warning("%s; the logits of whole batches are held in memory instead", error)
        return None


def _count_by_row(index: Tensor, width: int, rows: int) -> list[int]:
    """How many flat positions b * T + t lie in each of the B rows, T wide."""
    counts: list[int] = torch.bincount(index // width, minlength=rows).tolist()
    return counts


def _token_mask(examples: Sequence[Example], states: Tensor) -> Tensor:
    """[B, T], False where padded."""
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    return torch.arange(states.shape[1]) < lengths[:, None]
