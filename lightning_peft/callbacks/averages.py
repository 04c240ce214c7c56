"""Lightning's averages of weights: made of copies that are taken in ``setup``, before the module is adapted."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

from lightning_peft.core.adapted import site_of


def renew_averages(module: LightningModule) -> None:
    """Lets callbacks that average a module's weights copy it again where their copy is of the bare base.

    They walk through the parameters of both side by side, so a copy without the adapter would average one layer into
    another.

    Args:
        module: the module, just adapted.

    Raises:
        ValueError: if the average would be stochastic and the frozen base has batch norms.
    """
    trainer = module._trainer
    if trainer is None or trainer.state.fn != "fit":
        return
    names = [n for n, _ in module.named_parameters()]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            _refuse_frozen_statistics(module)
        elif not isinstance(callback, WeightAveraging):
            continue
        copied = callback._average_model
        copied = copied.module if isinstance(copied, AveragedModel) else copied
        if copied is not None and [n for n, _ in copied.named_parameters()] != names:
            callback._average_model = None  # its setup may adapt the module, which comes back here
            callback.setup(trainer, module, "fit")


def _refuse_frozen_statistics(module: Module) -> None:
    for name, part in module.named_modules():
        site = site_of(part)
        if site is not None and site.frozen_statistics:
            raise ValueError(
                f"StochasticWeightAveraging resets the running statistics of all batch norms and counts them anew, but "
                f"{name!r} belongs to the frozen base; use EMAWeightAveraging, which leaves them alone"
            )
