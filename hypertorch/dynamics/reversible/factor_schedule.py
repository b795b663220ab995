"""A setting that integers are multiplied by, as reversible factors for every parameter and step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hypertorch.dynamics.reversible.exact_arithmetic import GREATEST_FACTOR, LEAST_FACTOR, Factor, factor_of, factors_of
from hypertorch.dynamics.settings import Setting, UngroupedSetting, is_schedule, own_setting, resolve
from hypertorch.types import TensorMapping


class FactorSchedule:
    """The values of a setting as reversible factors.

    How much a product forgets must be known to the host, so the least and the greatest value for every parameter, and
    for every step of a schedule, are read to it: all at once, when the schedule is made, and never in between.

    Args:
        argument: how messages call the setting, backticks included.
        setting: the setting.
        parameters: names of the inner parameters.
        hparams: the outer variables.
        indices: of the steps to come.

    Raises:
        ValueError: if a value is outside (0, 1), or too close to 0.
    """

    def __init__(
        self,
        argument: str,
        setting: Setting,
        parameters: Iterable[str],
        hparams: TensorMapping,
        indices: range,
    ) -> None:
        self._settings: dict[str, UngroupedSetting] = {
            parameter: own_setting(setting, parameter) for parameter in parameters
        }
        self._scheduled = {parameter for parameter, own in self._settings.items() if is_schedule(own)}
        self._constant: dict[str, Factor] = {}
        self._hparams = hparams
        self._first_index = indices.start
        self._ranges = self._read_ranges(indices)
        for (parameter, index), values in self._ranges.items():
            for value in values:
                if not LEAST_FACTOR <= value <= GREATEST_FACTOR:
                    raise ValueError(
                        f"{argument} is {value} for `{parameter}` at inner step {index}, but only values in "
                        f"[{LEAST_FACTOR:.3g}, 1) can be reversed: 0 forgets the whole buffer, 1 or more never decays. "
                        "Learn it through a transform such as `torch.sigmoid`, keep it in range by its natural "
                        "constraint, or use a backend that does not reverse."
                    )

    def at(self, parameter: str, index: int) -> Factor:
        """Returns the factor for a parameter at a step."""
        if parameter in self._constant:
            return self._constant[parameter]
        scheduled = parameter in self._scheduled
        index = index if scheduled else self._first_index
        least, greatest = self._ranges[parameter, index]
        # One value has a fraction made for it; several need a numerator that serves all, and so a larger one.
        if least == greatest:
            factor = factor_of(least)
        else:
            value = resolve(self._settings[parameter], self._hparams, parameter, index)
            assert isinstance(value, Tensor)
            factor = factors_of(value, least, greatest)
        # A factor that does not change is searched for once, not at every step.
        if not scheduled:
            self._constant[parameter] = factor
        return factor

    @torch.no_grad()
    def _read_ranges(self, indices: range) -> dict[tuple[str, int], tuple[float, float]]:
        """Returns the least and the greatest value by parameter and step, of a constant at the first step only."""
        ranges: dict[tuple[str, int], tuple[float, float]] = {}
        on_device: dict[tuple[str, int], Tensor] = {}
        for parameter, setting in self._settings.items():
            for index in indices if parameter in self._scheduled else indices[:1]:
                value = resolve(setting, self._hparams, parameter, index)
                if isinstance(value, Tensor):
                    on_device[parameter, index] = torch.stack(torch.aminmax(value.double()))
                else:
                    ranges[parameter, index] = (value, value)
        if on_device:
            # One copy to the host, however many steps and params there are.
            read = torch.stack(list(on_device.values())).tolist()
            ranges.update({key: (least, greatest) for key, (least, greatest) in zip(on_device, read, strict=True)})
        return ranges
