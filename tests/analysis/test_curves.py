"""The picture on a model card: a curve where there is one, at a size that a page has room for."""

from __future__ import annotations

import struct

import torch

from lightning_peft.analysis.curves import curves_png
from lightning_peft.formats.training_record import TrainingRecord


def _record(steps=3, monitor=None, **metrics):
    record = TrainingRecord(step=steps, monitor=monitor)
    for step in range(1, steps + 1):
        record.add_loss(step, torch.tensor(1.0 / step))
    for name, values in metrics.items():
        for step, value in enumerate(values, start=1):
            record.add_metrics(step, {name.replace("__", "/"): value})
    return record


def test_a_picture_is_as_wide_as_a_page_twice():
    picture = curves_png(_record(val__loss=[1.0, 0.5], monitor="val/f1", val__f1=[0.1, 0.2]))
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24])[0] == 1280


def test_the_same_training_gives_the_same_bytes():
    assert curves_png(_record()) == curves_png(_record())


def test_where_there_is_no_curve_there_is_no_picture():
    assert curves_png(TrainingRecord()) is None
    assert curves_png(_record(steps=1)) is None


def test_a_name_with_a_dollar_sign_is_no_formula():
    assert curves_png(_record(monitor="val/$x_1$", **{"val/$x_1$": [0.1, 0.2]})) is not None


def test_a_monitored_loss_of_ones_own_name_has_its_panel_and_the_step_is_marked():
    several = _record(monitor="val_loss", val_loss=[0.3, 0.2, 0.1])
    one = _record()
    assert curves_png(several) != curves_png(one)
    assert curves_png(several.at(2)) != curves_png(several)
