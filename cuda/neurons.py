"""Which neurons of a gated MLP a prompt uses.

``hidden (B, T, F)`` is what enters the down projection, of any float dtype; a neuron is active where it is positive.
Counts are exact integers, ties go to the lower index.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.cuda.dispatch import operation, rows_at_once
from foveate.cuda.launch import aligned, launch
from foveate.errors import ParameterError

_BLOCK_ELEMENTS = 1 << 22  # activations looked at together
_CPU_BLOCK_ELEMENTS = 1 << 17  # so that a block stays in the cache
TOPK = ("mean", "per_token")


def neuron_counts(hidden: Tensor, rho: float, *, valid: Tensor | None = None, topk: str = "mean") -> Tensor:
    """How many tokens have each neuron among their strongest.

    Args:
        hidden: ``(B, T, F)``.
        rho: share of its active neurons that a token contributes, the strongest first.
        valid: ``(B, T)`` bool, tokens that count (None: all).
        topk: ``"mean"``: all tokens contribute equally many, ``floor(rho * active / T)`` with the active neurons of
            all T tokens, so a token may contribute inactive ones; ``"per_token"``: each contributes ``floor(rho * its
            own active)``.

    Returns:
        ``(B, F)`` int64. Memory O(B F) and a block of tokens; no copy of ``hidden``.

    Raises:
        ParameterError: unknown ``topk``.
    """
    if topk not in TOPK:
        raise ParameterError(f"topk={topk!r} is not one of {', '.join(map(repr, TOPK))}")
    batch, length, neurons = hidden.shape
    if valid is None:
        valid = hidden.new_ones(batch, length, dtype=torch.bool)
    active = _trues(hidden > 0) * valid  # (B, T)
    if topk == "mean":
        tokens = valid.sum(dim=1, keepdim=True).clamp(min=1)
        k = (rho * active.sum(dim=1, keepdim=True).double() / tokens).long().expand(batch, length)
    else:
        k = (rho * active.double()).long()
    k = k * valid
    counts = torch.zeros(batch, neurons, dtype=torch.long, device=hidden.device)
    waits = hidden.device.type != "cpu"  # asking for a value would stop the queue
    # no token has more active neurons than there are; one more, since the mean's rounding differs
    most = min(neurons, int(rho * neurons) + 1) if waits else int(k.max()) if k.numel() else 0
    step = max(1, (_BLOCK_ELEMENTS if waits else _CPU_BLOCK_ELEMENTS) // max(1, batch * neurons))
    step = step if waits else min(step, 255)
    for start in range(0, length if most else 0, step):
        block, wanted = hidden[:, start : start + step], k[:, start : start + step, None]
        if not waits:
            block = block.detach().to(torch.promote_types(block.dtype, torch.float32)).contiguous()
        weakest = _weakest(block, wanted, most)
        chosen = block >= weakest
        if waits or bool((_trues(chosen)[..., None] > wanted).any()):  # several neurons at the boundary, or none wanted
            equal = block == weakest
            room = wanted - (_trues(chosen) - _trues(equal))[..., None]
            chosen = _without_surplus(chosen, equal, room)
        # of at most 255 tokens a byte holds the sum
        counts += chosen.sum(dim=1) if waits else chosen.view(torch.uint8).sum(dim=1, dtype=torch.uint8)
    return counts


def _weakest(block: Tensor, wanted: Tensor, most: int) -> Tensor:
    """The ``wanted``-th largest activation of every token, ``(B, T, 1)``; anything where none is wanted."""
    last = (wanted - 1).clamp(min=0)
    if block.device.type != "cpu":
        return block.topk(most, dim=-1).values.gather(-1, last)
    place, values = block.shape[-1] - 1 - last.numpy(), block.numpy()  # NumPy uses vector instructions for both
    kth = np.unique(place)
    ordered = np.partition(values, kth[0], axis=-1) if len(kth) == 1 else np.sort(values, axis=-1)
    return torch.from_numpy(np.take_along_axis(ordered, place, axis=-1))


def _without_surplus(chosen: Tensor, equal: Tensor, room: Tensor) -> Tensor:
    """``chosen (B, T, F)`` without what is ``equal`` behind a row's first ``room (B, T, 1)`` equals."""
    if chosen.device.type != "cpu":
        return chosen & ~(equal & (equal.cumsum(dim=-1, dtype=torch.int32) > room))
    place = torch.from_numpy(np.flatnonzero(equal.numpy()))  # few, even of half precision
    row, count = place // equal.shape[-1], _trues(equal).flatten()
    rank = torch.arange(len(place)) - (count.cumsum(0) - count)[row]
    chosen.view(-1)[place[rank >= room.flatten()[row]]] = False
    return chosen


def _trues(mask: Tensor) -> Tensor:
    """How many of the last axis are true, int64. On the CPU PyTorch would make int64 of every element first."""
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1)) if mask.device.type == "cpu" else mask.sum(dim=-1)


def core_neurons(counts: Tensor, beta: float) -> Tensor:
    """The ``floor(beta * F)`` neurons of largest count, none that has count 0: ``(B, F) -> (B, F)`` bool."""
    first = counts.argsort(dim=-1, descending=True, stable=True)[..., : int(beta * counts.shape[-1])]
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, first, True) & (counts > 0)


def match_counts(active: Tensor, core: Tensor) -> Tensor:
    """Neurons that each token shares with a set: the bits set in both, counted.

    Args:
        active: ``(B, N, F)`` bool, or activations of any float dtype, where the positive ones count.
        core: ``(B, F)`` bool.

    Returns:
        ``(B, N)`` int64. Reads ``active`` once. On CUDA activations become bits in registers, so pass them as they are:
        ``hidden > 0`` would write them once and read them once more.
    """
    return _matches(active, core.bool())


# the unsigned integer of each dtype's size, and the bits of its infinity
_BITS = {
    torch.bool: "unsigned char, 1",
    torch.float16: "unsigned short, 0x7c00",
    torch.bfloat16: "unsigned short, 0x7f80",
    torch.float32: "unsigned, 0x7f800000",
}


def _matches_kernel(active: Tensor, core: Tensor) -> Tensor:
    active = aligned(active if active.dtype in _BITS else active > 0)
    core = pad(core, (0, -core.shape[-1] % 16)).contiguous()
    batch, n, width = active.shape
    counts = torch.empty(batch, n, dtype=torch.int64, device=active.device)
    args = (active, *map(np.int64, active.stride()[:2]), core, np.int32(n), np.int32(width), counts)
    kernel, shared = f"matches<{_BITS[active.dtype]}>", core.shape[-1] // 8
    launch("tokens.cu", kernel, (-(-n // 8), batch, 1), 256, args, shared=shared, device=active.device)
    return counts


@operation(
    "match_counts(Tensor active, Tensor core) -> Tensor",
    kernel=_matches_kernel,
    fake=lambda active, core: active.new_empty(active.shape[:2], dtype=torch.int64),
)
def _matches(active: Tensor, core: Tensor) -> Tensor:
    counts = []
    for block in active.split(rows_at_once(core.numel()), dim=1):
        bits = block if block.dtype == torch.bool else block > 0
        counts.append(_trues(bits & core[:, None]))
    return torch.cat(counts, dim=1)
