"""What of a student stays as it is: for good, below its top layers, or until its turn comes.

freeze: [patterns]  ->  Freezing  -> requires_grad
gradual: {until: u} -> Unfreezing -> the levels that learn at a share of the steps
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from pipeline.config import StrictModel
from pipeline.errors import ConfigError
from pipeline.student.parameters import levels_below_head, match_parameters
from pipeline.terms import PROJECTIONS


class Gradual(StrictModel):
    """Begin with the head alone and let one layer more learn at equal distances, the last first.

    The embeddings come after the first layer. Howard and Ruder 2018 (ULMFiT); Mukherjee and
    Awadallah 2020 (XtremeDistil).

    Attributes:
        until: the share of the steps after which everything learns.
    """

    until: float = Field(default=0.5, gt=0.0, le=1.0)


class Freezing(StrictModel):
    """Which parameters do not learn. The losses' own projections always do.

    Attributes:
        patterns: name patterns (`*` and `?`) of parameters that stay as they are.
        top: only so many of the last layers learn, and what stands above them; 0 for the head.
        gradual: the others wait for their turn.
    """

    patterns: list[str] = []
    top: int | None = Field(default=None, ge=0)
    gradual: Gradual | None = None

    @model_validator(mode="after")
    def _choose_one(self) -> "Freezing":
        if self.top is not None and self.gradual is not None:
            raise ConfigError("freeze: has both top and gradual; give one of them")
        return self

    def apply(self, model: nn.Module) -> None:
        """Stop training of what stays for good.

        Raises:
            ConfigError: a pattern matches no parameter (with the nearest name), or all is frozen.
            ModelError: top layers are wanted, but cannot be told by their names.
        """
        parameters = dict(model.named_parameters())
        frozen = {n for p in self.patterns for n in match_parameters(parameters, p, "freeze")}
        if self.top is not None:
            levels = levels_below_head(model)
            frozen |= {name for name in parameters if levels[name] > self.top}
        for name in frozen:
            parameters[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ConfigError("freeze: leaves no parameter that learns; freeze less")


def _from_list(value: Any) -> Any:
    """A list is that of the patterns."""
    return {"patterns": value} if isinstance(value, list) else value


Freeze = Annotated[Freezing, BeforeValidator(_from_list)]


class Unfreezing:
    """Gradual unfreezing under way: a pure function of how far the training is.

    Args:
        model: what is for good frozen stands; called where the optimizer has all others.
        gradual: the schedule.
        hold: stop gradients by requires_grad, which saves their computation. Elsewhere (DDP waits
            for all of them) they are computed, and dropped by `drop_gradients`.
    """

    def __init__(self, model: nn.Module, gradual: Gradual, hold: bool = True):
        levels = levels_below_head(model)
        self._levels: Mapping[nn.Parameter, int] = {
            parameter: levels[name]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and PROJECTIONS not in name.split(".")
        }
        self._steps = max(levels.values())
        self._until = gradual.until
        self._hold = hold
        self._learning = self._steps

    def advance(self, progress: float) -> None:
        """Freeze what waits at a share of the steps, in [0, 1]."""
        # A level's turn that falls on a step must not miss it by the last bit.
        learning = min(int(progress / self._until * self._steps + 1e-9), self._steps)
        if learning != self._learning and self._hold:
            for parameter, level in self._levels.items():
                parameter.requires_grad_(level <= learning)
        self._learning = learning

    def drop_gradients(self) -> None:
        """Forget the gradients of what waits, so that no step and no clipping sees them."""
        for parameter, level in self._levels.items():
            if level > self._learning:
                parameter.grad = None
