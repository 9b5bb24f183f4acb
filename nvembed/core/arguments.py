"""Checks of arguments: what a public function was given, where it is wrong, and what to give instead.

Every check returns the value as the function uses it, or raises a `UserError` that begins with the argument's name.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from nvembed.core.messages import nearest
from nvembed.types import UserError

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = 80  # characters of a value in a message
_LARGEST = 2**31 - 1  # of a count
_PLAIN = (str, bytes, bool, numbers.Number, list, tuple, dict, set, frozenset, type(None))
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


# -- words ------------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A wrong value in a message: plain values as they are written, anything else by its type and shape."""
    if isinstance(value, _PLAIN):
        text = _short.repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    if isinstance(value, type):
        return f"the class {name}"
    shape = getattr(value, "shape", None)
    article = "an" if name[0].lower() in "aeiou" or name == "ndarray" else "a"
    return f"{article} {name}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


# -- names ------------------------------------------------------------------------------------------------------------


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the public API: a call with unknown or missing arguments is a `UserError` with the nearest name."""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]
    title = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in names]
            problem = "; ".join(f"unknown argument {name!r}.{nearest(name, names)}" for name in unknown) or f"{error}."
            raise UserError(f"{title}: {problem} It takes: {', '.join(names)}.") from None
        return function(*args, **kwargs)

    return checked


# -- values -----------------------------------------------------------------------------------------------------------


def check_count(name: str, value: Any, *, least: int | None = 1, most: int | None = _LARGEST) -> int:
    """A whole number between two bounds, as a Python int; a bool and a float are none.

    Raises:
        UserError: anything else.
    """
    try:
        number = None if isinstance(value, bool) or type(value).__name__ == "bool" else operator.index(value)
    except TypeError:
        number = None
    least_text = "" if least is None else f" of at least {least}"
    if number is None:
        raise UserError(f"{name} is {shown(value)}; give a whole number{least_text}.")
    if least is not None and number < least:
        raise UserError(f"{name} is {number}; give a whole number{least_text}.")
    if most is not None and number > most:
        raise UserError(f"{name} is {shown(number)}; give at most {most:,}.")
    return number


def check_optional_count(name: str, value: Any) -> int | None:
    """`check_count` of at least 1, or None."""
    return None if value is None else check_count(name, value)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A real number between two bounds, both included; a bool and NaN are none.

    Raises:
        UserError: anything else.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or math.isnan(value) or not low <= value <= high:
        raise UserError(f"{name} is {shown(value)}; give a number from {low:g} to {high:g}.")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False: the string "false" would count as true.

    Raises:
        UserError: anything else.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; give True or False.")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words.

    Raises:
        UserError: anything else; the message names the nearest.
    """
    if not isinstance(value, str) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{name} {shown(value)}: choose {', '.join(choices[:-1])} or {choices[-1]}.{hint}")
    return value


def check_address(name: str, value: Any, what: str) -> str:
    """A path or URI as a string.

    Args:
        what: a description of what lies there, for the message.

    Raises:
        UserError: neither a string nor a path, or an empty one.
    """
    address = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(address, str) or not address.strip():
        raise UserError(f"{name} is {shown(value)}; give {what}.")
    return address


def check_mapping(name: str, value: Any, advice: str) -> Mapping[Any, Any]:
    """A mapping.

    Args:
        advice: the sentence that says what to give instead.

    Raises:
        UserError: anything else.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {shown(value)}, not a mapping. {advice}")
    return value


def check_list(name: str, value: Any, what: str, advice: str = "") -> list[Any]:
    """The items of a list, tuple, one-dimensional array, column or generator, in order.

    Args:
        what: the items, in the plural: "texts".
        advice: a sentence that ends the message of anything that has no items.

    Raises:
        UserError: one string, something without items, a mapping, a set (it has no order), a table.
    """
    problem = f"{name} is {shown(value)}, not a list of {what}."
    if isinstance(value, bytes):
        raise UserError(f"{problem} Give strings; bytes.decode() makes one.")
    if isinstance(value, str):
        raise UserError(f"{problem} For a single one write [{shown(value)}].{advice}")
    if isinstance(value, Mapping):
        raise UserError(f"{problem} Give a list, such as list({name}.values()).")
    if isinstance(value, set | frozenset):
        raise UserError(f"{problem} A set has no order; give a list, such as sorted({name}).")
    if hasattr(value, "columns"):
        raise UserError(f"{problem} Give one column, such as {name}[column].tolist().")
    if getattr(value, "ndim", 1) != 1 or not isinstance(value, Iterable):
        raise UserError(f"{problem} Give a list.{advice}")
    return list(value)
