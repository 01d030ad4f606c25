"""Budgets as users write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from foveate.errors import BudgetError, ParameterError
from foveate.pruners.core import Keep
from foveate.pruners.core.parameters import check_keep

__all__ = ["checked_budgets", "parse_keep"]


def checked_budgets(keep: Keep | Sequence[Keep]) -> list[Keep]:
    """The different budgets among these.

    Raises:
        ParameterError: none. BudgetError: one that cannot be used.
    """
    budgets = [check_keep("keep", k) for k in (keep if isinstance(keep, Sequence) else [keep])]
    if not budgets:
        raise ParameterError("keep is empty; give at least one budget, for example 0.25")
    return list({(type(k), k): k for k in budgets}.values())  # 1 token is not the fraction 1.0


def parse_keep(text: str) -> list[Keep]:
    """``"0.5,1/9,64"`` -> ``[0.5, 0.111…, 64]``: what has only digits is a number of tokens, the rest fractions.

    Raises:
        ParameterError: not a number. BudgetError: no usable budget.
    """
    budgets: list[Keep] = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            whole = re.fullmatch(r"[+-]?\d+", part)
            budgets.append(check_keep("keep", int(part) if whole else float(Fraction(part) if "/" in part else part)))
        except BudgetError:
            raise
        except (ValueError, ZeroDivisionError):
            raise ParameterError(
                f"keep={part!r} is not a number; give fractions in (0, 1] or numbers of tokens"
            ) from None
    return budgets
