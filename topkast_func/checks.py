"""Checks of single arguments, whose errors name the argument, its range and its value."""

from collections.abc import Sequence
from numbers import Integral, Real

LARGEST = 3.4028234663852886e38
"""The largest number of float32, in which much is computed."""
MOST = 2**63 - 1
"""The largest number of int64, in which steps and seeds are kept."""


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return ``value`` as a float if it is a real number in [low, high).

    Args:
        name: What the number is called in the error.
        value: The number to check.
        low: Lowest value allowed.
        high: First value that is too large.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
        ValueError: ``value`` is NaN, outside [low, high), or too large for float32.
    """
    number = check_real(name, value, f"[{low}, {high})")
    if not low <= number < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value!r}")
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, as float32 is, got {value!r}")
    return number


def check_fraction(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a real number in [0, 1].

    Args:
        name: What the number is called in the error.
        value: The number to check.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
        ValueError: ``value`` is NaN or outside [0, 1].
    """
    number = check_real(name, value, "[0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return number


def check_share(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a real number in (0, 1].

    Args:
        name: What the number is called in the error.
        value: The number to check.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
        ValueError: ``value`` is NaN or outside (0, 1].
    """
    number = check_real(name, value, "(0, 1]")
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return number


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> object:
    """Return ``value`` if it is one of ``choices``.

    Args:
        name: What the value is called in the error.
        value: The value to check.
        choices: What it may be.

    Returns:
        The value.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def check_real(name: str, value: object, allowed: str) -> float:
    """Return ``value`` as a float if it is a real number.

    Args:
        name: What the number is called in the error.
        value: The number to check.
        allowed: Its range, for the error.

    Returns:
        The number as a float.

    Raises:
        TypeError: ``value`` is not a real number (booleans and strings are not).
        ValueError: It is too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number in {allowed}, got one too large") from None


def check_count(name: str, value: object, low: int, high: int = MOST) -> int:
    """Return ``value`` as an int if it is a whole number in [low, high].

    Args:
        name: What the number is called in the error.
        value: The number to check.
        low: Lowest value allowed.
        high: Largest value allowed.

    Returns:
        The number as an int.

    Raises:
        TypeError: ``value`` is not an integer (booleans are not).
        ValueError: ``value`` is below ``low`` or above ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {low}, got {value!r}")
    count = int(value)
    if count < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    if count > high:
        raise ValueError(f"{name} must be at most {high}, got a larger one")
    return count


def check_order(
    forward_sparsity: float,
    backward_sparsity: float,
    name: str = "backward_sparsity",
    limit: str = "forward_sparsity",
) -> None:
    """Check that the backward set holds the forward set.

    Args:
        forward_sparsity: 1 − D, fraction.
        backward_sparsity: 1 − (D + M), fraction.
        name: What the backward sparsity is called in the error.
        limit: What the forward sparsity is called there.

    Raises:
        ValueError: The backward sparsity exceeds the forward sparsity.
    """
    if backward_sparsity > forward_sparsity:
        raise ValueError(
            f"{name} must be in [0, {limit}={forward_sparsity}], got {backward_sparsity}"
        )


def check_block_shape(name: str, value: object) -> tuple[int, int]:
    """Return ``value`` as a pair of integers of at least 1.

    Args:
        name: What the pair is called in the error.
        value: The pair to check.

    Returns:
        Rows and columns of a block.

    Raises:
        TypeError: ``value`` is not a pair of integers.
        ValueError: One of them is below 1.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (rows, columns), got {value!r}")
    rows, columns = (check_count(name, side, 1) for side in value)
    return rows, columns


def check_type(name: str, value: object, kind: type, way: str = "") -> None:
    """Check that an argument is of the type that it must be of.

    Args:
        name: What it is called in the error.
        value: The argument.
        kind: The type.
        way: What the error says at its end, of the way on.

    Raises:
        TypeError: It is of another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}{way}")


def check_callable(name: str, value: object) -> None:
    """Check that an argument can be called.

    Args:
        name: What it is called in the error.
        value: The argument.

    Raises:
        TypeError: It cannot.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")
