"""What a method is to the core: a recipe that says which layers go where and which parameters train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.problems import an

if TYPE_CHECKING:
    from lightning_peft.core.tree import AdapterTree


@dataclass
class Placement:
    """What a method does to one model.

    Attributes:
        layers: the adapter layer for each module, by the module's name below the root (``""`` is the root).
        in_place: names of the base's parameters that train in place.
        keep_originals: whether the starting values of ``in_place`` are kept, so that the base can be given back.
    """

    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    in_place: list[str] = field(default_factory=list)
    keep_originals: bool = True


@runtime_checkable
class Method(Protocol):
    """A parameter-efficient method: a dataclass whose fields are its options.

    Attributes:
        learning_rate: the rate for AdamW that suits the method; `PeftModule` takes it when none is given.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        peft_type: Hugging Face PEFT's name for the method, or None where it has none.
        mergeable: whether its layers are changes of weights.
    """

    learning_rate: float
    modules_to_save: list[str] | None

    @property
    def peft_type(self) -> str | None:
        """As above; with most methods the class's."""
        ...

    @property
    def mergeable(self) -> bool:
        """As above; with most methods the class's."""
        ...

    def place(self, model: Module) -> Placement:
        """Chooses the modules of a model and makes their layers; changes nothing in the model."""
        ...


def require_method(given: object) -> None:
    """Refuses what is no method, before anything is done with it.

    Args:
        given: what the user passed where a method is wanted.

    Raises:
        TypeError: if it is something else; a method's class is told apart from a method.
    """
    if isinstance(given, type) and isinstance(given, Method):
        raise TypeError(f"a method such as {given.__name__}() is expected, but got the class {given.__name__} itself")
    if not isinstance(given, Method):
        raise TypeError(f"a method such as LoRA(r=8) is expected, but got {given!r}, {an(type(given).__name__)}")


@runtime_checkable
class PeftFormat(Protocol):
    """The file form of a method that Hugging Face PEFT knows under its ``peft_type``."""

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The method's own fields of ``adapter_config.json``.

        Args:
            model: the adapted model.
            placed: names of the modules that carry a layer.
        """
        ...

    def peft_name(self, key: str, model: Module) -> str:
        """The name in a PEFT file of one of the adapter's tensors.

        Args:
            key: the tensor's name in the adapter, such as ``layers.0.q_proj.lora_A``.
            model: the adapted model.
        """
        ...

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Method:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for something that is not supported here.
        """
        ...


@runtime_checkable
class PeftRepacked(Protocol):
    """A method whose tensors in a Hugging Face PEFT file are not its own one by one."""

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file out of the adapter's, both under the adapter's names.

        Args:
            tensors: the adapter's state.
        """
        ...

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors out of those of the file.

        Args:
            stored: as `to_peft` gives them.
        """
        ...


@runtime_checkable
class Seeded(Protocol):
    """A method with tensors that never train and follow from its options alone, a seed among them.

    Attributes:
        seeded: their names in the adapter. A Hugging Face PEFT file may leave them out.
    """

    @property
    def seeded(self) -> tuple[str, ...]:
        """As above; with most methods the class's."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A method with numbers, such as a rank, that a module bounds."""

    def refuse_beyond(self, model: Module, layers: dict[str, AdapterLayer]) -> None:
        """Refuses numbers beyond what their modules have room for, when an adapter is made.

        One that was saved is never asked: other libraries make adapters with more rank than their weights have, and
        what such a file says is still well defined.

        Args:
            model: the root.
            layers: those that `place` gave for it.

        Raises:
            ValueError: if there is one.
        """
        ...


@runtime_checkable
class Residual(Protocol):
    """A method whose adapter may start as what quantizing the base has lost.

    Attributes:
        needs_codes: whether these options ask for it: then it fits a base with the same codes alone.
    """

    @property
    def needs_codes(self) -> bool:
        """As above."""
        ...

    def make_up(self, model: Module, layers: dict[str, AdapterLayer]) -> None:
        """Sets new layers to what quantizing has lost; one that was saved is never asked.

        Args:
            model: the root.
            layers: those that `place` gave for it.

        Raises:
            ValueError: if a weight is not quantized, or what it was before is not known.
        """
        ...


@runtime_checkable
class DataDriven(Protocol):
    """A method that looks at training data once, before the first step."""

    @property
    def needs_data(self) -> bool:
        """Whether these options ask for it."""
        ...

    def prepare(self, model: Module, tree: AdapterTree, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Sets the adapter up from data; the shapes of its tensors stay what they are.

        Args:
            model: the adapted model, in evaluation mode.
            tree: the adapter.
            losses: a callable for each batch of training data, which runs the model on it and gives the loss.
        """
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A method that may act during training, around every step of the optimizer.

    Attributes:
        total_step: how many steps its schedule has; None takes the run's.
    """

    total_step: int | None

    @property
    def scheduled(self) -> bool:
        """Whether these options ask for it."""
        ...

    def check_schedule(self, total: int) -> None:
        """Refuses a training that its schedule does not fit, before the first step.

        Args:
            total: how many steps the training has.

        Raises:
            ValueError: if it does not.
        """
        ...

    def before_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """Between the backward pass and the optimizer's step: the gradients are whole and may be changed.

        Args:
            model: the adapted model.
            tree: the adapter.
            step: the number of this step, from 1.
            total: how many steps the training has.
        """
        ...

    def after_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """After the optimizer's step, with the gradients still there.

        Args:
            model: the adapted model.
            tree: the adapter.
            step: the number of this step, from 1.
            total: how many steps the training has.
        """
        ...
