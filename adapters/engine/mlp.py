"""Run a gated MLP ``down(act(gate(x)) * up(x))`` with some of its neurons only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from foveate.errors import MissingSignalError

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def check_gated(mlp: nn.Module, where: str) -> None:
    """Raise :class:`MissingSignalError` unless ``mlp`` has plain gate, up and down projections whose weights are at
    hand.
    """
    missing = [name for name in (*_PROJECTIONS, "act_fn") if not hasattr(mlp, name)]
    if missing:
        raise MissingSignalError(
            f"{where} is a {type(mlp).__name__} without {', '.join(missing)}; methods that read neurons need a gated "
            "MLP "
            "(gate_proj, up_proj, down_proj, act_fn), which mixtures of experts and plain MLPs are not"
        )
    for name in _PROJECTIONS:
        projection = getattr(mlp, name)
        if type(projection) is not nn.Linear or not projection.weight.is_floating_point():
            raise MissingSignalError(
                f"{name} of {where} is a {type(projection).__name__}; neurons can be taken out of plain linear "
                "layers only: "
                "merge adapters into the weights, and load the model unquantised"
            )
        if projection.weight.is_meta:
            raise MissingSignalError(
                f"{name} of {where} is offloaded; neurons can be taken out of weights in memory only"
            )


class SparseMLP:
    """Stands in for the forward of one gated MLP: the model's own, until :meth:`serve` names neurons.

    The weights of these neurons are copied once per set; memory: their share of the MLP for every different set.
    """

    most_sets = 2  # from three different prompts on, gathered weights are more to read than dense ones

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = mlp
        self._own: dict[str, Any] = {k: v for k, v in vars(mlp).items() if k == "forward"}
        self._dense = mlp.forward
        self._key: Any = None
        self._neurons: Tensor | None = None
        self._active = False
        self._sets: list[_Set] | None = None
        mlp.forward = self._forward

    def serve(self, neurons: Tensor | None) -> None:
        """Run ``neurons (B, F)`` bool from now on, row by row of the batch; None: all. One tensor is one prompt's
        set.
        """
        self._active = neurons is not None
        if neurons is None or (neurons is self._neurons and self._key == self._weights()):
            return
        self._neurons, self._key, self._sets = neurons, self._weights(), None
        rows = neurons[:1] if bool((neurons == neurons[:1]).all()) else neurons
        if len(rows) <= self.most_sets:
            self._sets = [_Set(self.mlp, row) for row in rows]

    def _weights(self) -> tuple[Any, ...]:
        weight = self.mlp.gate_proj.weight
        return weight.data_ptr(), weight.dtype, weight.device

    def _forward(self, x: Tensor) -> Tensor:
        if not self._active or self._sets is None:
            return self._dense(x)
        if len(self._sets) == 1:
            return self._sets[0](x)
        return torch.cat([one(row) for one, row in zip(self._sets, x.split(1), strict=True)])

    def remove(self) -> None:
        """Give the MLP its own forward back."""
        vars(self.mlp).pop("forward", None)
        vars(self.mlp).update(self._own)
        self._active, self._neurons, self._sets = False, None, None


class _Set:
    """The weights of one set of neurons: rows of gate and up, one after the other, and columns of down."""

    @torch.no_grad()
    def __init__(self, mlp: nn.Module, neurons: Tensor) -> None:
        index = neurons.to(mlp.gate_proj.weight.device).nonzero().squeeze(1)
        self.act = mlp.act_fn
        self.into = torch.cat([mlp.gate_proj.weight[index], mlp.up_proj.weight[index]])
        biases = mlp.gate_proj.bias, mlp.up_proj.bias
        self.into_bias = None if biases[0] is None else torch.cat([bias[index] for bias in biases])
        self.down, self.down_bias = mlp.down_proj.weight[:, index], mlp.down_proj.bias

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.into, self.into_bias).chunk(2, dim=-1)
        return linear(self.act(gate) * up, self.down, self.down_bias)
