"""To whom data belongs: the task that says what rows mean, and what makes its inputs ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningDataModule

from lightning_peft.core.problems import nearest
from lightning_peft.data.sources import ID
from lightning_peft.tasks.task import processing_auto_class

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task

_DATA_OF = {
    "AutoTokenizer": "TextDataModule (data=files)",
    "AutoImageProcessor": "ImageDataModule (data=images)",
}


class ConnectedDataModule(LightningDataModule):
    """Data for a task.

    The task, and what makes its inputs ready (a tokenizer or an image processor), come from the LightningModule that
    is trained (`PeftModule` has both), or from `connect`.

    Args:
        columns: the data's name for each of the task's columns.
    """

    processing: ClassVar[str]
    """Transformers' auto class of what makes the inputs ready."""

    def __init__(self, columns: dict[str, str | None] | None) -> None:
        super().__init__()
        self.columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self._task: Any = None
        self._processing_class: Any = None

    def connect(self, task: Task, processing_class: Any) -> None:
        """Says which task the rows are for, and what makes its inputs ready, where no trainer does.

        Args:
            task: the task.
            processing_class: a Hugging Face tokenizer, or an image processor.

        Raises:
            ValueError: if the task is about something else, or ``columns`` names one that it does not know.
        """
        self._refuse_other(task)
        known = {ID, *(column for shape in task.columns for column in shape.all())}
        unknown = [c for c in self.columns if c not in known]
        if unknown:
            raise ValueError(f"columns: the task knows no column {unknown[0]!r}{nearest(unknown[0], known)}")
        self._task, self._processing_class = task, processing_class

    def _refuse_other(self, task: Task) -> None:
        wanted = processing_auto_class(task)
        if wanted != self.processing:
            raise ValueError(
                f"{type(self).__name__} makes inputs with an {self.processing}, but the task "
                f"{task.to_config()['name']} takes those of an {wanted}: give it {_DATA_OF.get(wanted, 'other data')}"
            )

    @property
    def task(self) -> Any:
        """The task.

        Raises:
            RuntimeError: before `setup` or `connect`.
        """
        if self._task is None:
            raise RuntimeError(
                "the data knows no task yet; call connect(task, processing_class), or let a Trainer run setup"
            )
        return self._task

    @property
    def processing_class(self) -> Any:
        """What makes inputs ready; None before `setup` or `connect`."""
        return self._processing_class

    def connect_to_trainer(self) -> None:
        """Takes task and processing class from the LightningModule that is trained, unless `connect` has given them.

        Raises:
            TypeError: if it has none.
            ValueError: if its task is about something else.
        """
        if self._task is not None:
            return
        module: Any = getattr(self.trainer, "lightning_module", None)
        if hasattr(module, "task"):
            self._refuse_other(module.task)  # before what it needs is loaded
        if not hasattr(module, "task") or not hasattr(module, "processing_class"):
            raise TypeError(
                f"{type(self).__name__} needs a LightningModule with the attributes task and processing_class, as "
                f"PeftModule has them, but got {type(module).__name__}; or call connect(task, processing_class)"
            )
        self.connect(module.task, module.processing_class)
