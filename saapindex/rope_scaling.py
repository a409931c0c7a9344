"""How a model stretches rotary frequencies to contexts longer than it was first trained on.

Each scaling turns the base `theta` and the number of rotary dimensions into frequencies, and says by
how much rotated keys and queries are multiplied. The formulas are those of ``transformers``, in float64.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Scaling",
    "YarnScaling",
    "base_frequencies",
    "check_keys",
    "number",
    "whole_number",
]


def number(value: object, name: str, *, above: float = 0.0) -> float:
    """Return `value` as a float that is finite and greater than `above`.

    Raises
    ------
    InvalidInputError
        If it is no real number, not finite, or too small.

    Examples
    --------
    >>> number(2, "factor")
    2.0
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if math.isfinite(result) and result > above:
            return result
    raise InvalidInputError(f"{name} is {value!r}, expected a finite number above {above:g}")


def whole_number(value: object, name: str, *, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`.

    Raises
    ------
    InvalidInputError
        If it is no integer, or too small.

    Examples
    --------
    >>> whole_number(8192, "context", minimum=1)
    8192
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= minimum:
        return int(value)
    raise InvalidInputError(f"{name} is {value!r}, expected an integer of at least {minimum}")


def check_keys(data: object, name: str, *, known: set[str], required: set[str]) -> dict[str, Any]:
    """Return `data` as a dict whose keys are all of `required` and none outside `known`.

    Raises
    ------
    InvalidInputError
        If it is no mapping, or if keys are missing or unknown.

    Examples
    --------
    >>> check_keys({"dim": 64}, "rope", known={"dim", "theta"}, required={"dim"})
    {'dim': 64}
    """
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{name} is a {type(data).__name__}, expected a dict")
    unknown = sorted(str(key) for key in data if key not in known)
    missing = sorted(required - set(data))
    if unknown:
        raise InvalidInputError(f"{name} has the unknown keys {unknown}, expected some of {sorted(known)}")
    if missing:
        raise InvalidInputError(f"{name} lacks the keys {missing}")
    return dict(data)


def base_frequencies(theta: float, dim: int) -> NDArray[np.float64]:
    """Return ``theta ** (-2i / dim)`` for each pair `i`, float64, shape (dim / 2,).

    Source: RoFormer, arXiv 2104.09864.

    Examples
    --------
    >>> base_frequencies(10000.0, 4)
    array([1.  , 0.01])
    """
    return 1.0 / theta ** (np.arange(0, dim, 2) / dim)


@dataclass(frozen=True, kw_only=True)
class Scaling(ABC):
    """What every scaling offers. Scalings are immutable, comparable and hashable.

    Raises
    ------
    InvalidInputError
        From each constructor, if a parameter has the wrong type or range.
    """

    kind: ClassVar[str]

    @abstractmethod
    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, radians per position, float64, shape (dim / 2,).

        Raises
        ------
        InvalidInputError
            If the scaling does not fit `dim`.
        """

    def amplitude(self) -> float:
        """Return the factor on every rotated key and query."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as a dict that JSON can hold; ``"type"`` names the class.

        Examples
        --------
        >>> LinearScaling(factor=4.0).to_dict()
        {'type': 'linear', 'factor': 4.0}
        """
        fields = dataclasses.asdict(self)
        return {
            "type": self.kind,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Scaling:
        """Build the scaling that `to_dict` described.

        Raises
        ------
        InvalidInputError
            If the type is unknown, keys are missing or unknown, or a value is out of range.

        Examples
        --------
        >>> Scaling.from_dict({"type": "linear", "factor": 4.0})
        LinearScaling(factor=4.0)
        """
        if not isinstance(data, Mapping):
            raise InvalidInputError(f"scaling is a {type(data).__name__}, expected a dict")
        kind = data.get("type")
        for scaling in _SCALINGS:
            if scaling.kind == kind:
                break
        else:
            known_types = sorted(scaling.kind for scaling in _SCALINGS)
            raise InvalidInputError(f"scaling has type {kind!r}, expected one of {known_types}")
        fields = dataclasses.fields(scaling)
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        known = {field.name for field in fields} | {"type"}
        values = check_keys(data, f"scaling {kind!r}", known=known, required=required)
        del values["type"]
        return scaling(**values)

    def _set(self, **values: object) -> None:
        """Store checked values in the frozen instance."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Position interpolation: every frequency is divided by `factor` (arXiv 2306.15595).

    Parameters
    ----------
    factor
        How many times longer the context becomes.

    Examples
    --------
    >>> LinearScaling(factor=2.0).frequencies(10000.0, 4)
    array([0.5  , 0.005])
    """

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        self._set(factor=number(self.factor, "factor"))

    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, float64, shape (dim / 2,)."""
        return base_frequencies(theta, dim) / self.factor


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(Scaling):
    """NTK-aware scaling: `theta` grows with the context, so slow pairs stretch and fast ones stay.

    A model grows it as a sequence becomes longer. An index keeps the frequencies of one length.

    Parameters
    ----------
    factor
        How fast the base grows beyond the original context.
    original_max_position
        Longest context without scaling.
    context
        Length that is served. Up to `original_max_position` nothing is scaled.

    Examples
    --------
    >>> scaling = DynamicNTKScaling(factor=2.0, original_max_position=2048, context=4096)
    >>> scaling.frequencies(10000.0, 4).round(5)
    array([1.     , 0.00333])
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_max_position: int
    context: int

    def __post_init__(self) -> None:
        self._set(
            factor=number(self.factor, "factor"),
            original_max_position=whole_number(
                self.original_max_position, "original_max_position", minimum=1
            ),
            context=whole_number(self.context, "context", minimum=1),
        )

    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, float64, shape (dim / 2,).

        Raises
        ------
        InvalidInputError
            If `dim` is below 4: with one pair there is no slow one to stretch.
        """
        if dim < 4:
            raise InvalidInputError(f"dim is {dim}, expected at least 4 with dynamic scaling")
        length = max(self.context, self.original_max_position)
        growth = self.factor * length / self.original_max_position - (self.factor - 1.0)
        return base_frequencies(theta * growth ** (dim / (dim - 2)), dim)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN: slow pairs are interpolated, fast ones kept, those between blended (arXiv 2309.00071).

    Parameters
    ----------
    factor
        How many times longer the context becomes.
    original_max_position
        Longest context of the first training.
    beta_fast, beta_slow
        Pairs that turn more than `beta_fast` times over the original context are kept; those that
        turn less than `beta_slow` times are interpolated in full.
    mscale, mscale_all_dim
        Weights of the attention factor, as DeepSeek has them. Without both (or with a zero) the
        paper's factor holds.
    attention_factor
        Factor on rotated keys and queries; None computes it from the other parameters.
    truncate
        Whether the borders of the blend are rounded outwards to whole pairs.

    Examples
    --------
    >>> scaling = YarnScaling(factor=4.0, original_max_position=4096)
    >>> scaling.frequencies(10000.0, 8).round(6)
    array([1.00e+00, 1.00e-01, 6.25e-03, 2.50e-04])
    >>> round(scaling.amplitude(), 4)
    1.1386
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        self._set(
            factor=number(self.factor, "factor"),
            original_max_position=whole_number(
                self.original_max_position, "original_max_position", minimum=1
            ),
            beta_fast=number(self.beta_fast, "beta_fast"),
            beta_slow=number(self.beta_slow, "beta_slow"),
            mscale=_optional(self.mscale, "mscale", zero=True),
            mscale_all_dim=_optional(self.mscale_all_dim, "mscale_all_dim", zero=True),
            attention_factor=_optional(self.attention_factor, "attention_factor"),
        )
        if self.beta_fast < self.beta_slow:
            raise InvalidInputError(
                f"beta_fast is {self.beta_fast:g}, expected at least beta_slow, {self.beta_slow:g}"
            )
        if not isinstance(self.truncate, bool):
            raise InvalidInputError(f"truncate is {self.truncate!r}, expected True or False")

    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, float64, shape (dim / 2,)."""

        def border(turns: float) -> float:
            """Pair, as a fraction, that turns this many times over the original context."""
            wavelength = self.original_max_position / turns
            return dim * math.log(wavelength / (2.0 * math.pi)) / (2.0 * math.log(theta))

        low, high = border(self.beta_fast), border(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return _blend(base_frequencies(theta, dim), self.factor, stretched)

    def amplitude(self) -> float:
        """Return the factor on every rotated key and query."""

        def growth(weight: float) -> float:
            return 1.0 if self.factor <= 1.0 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
    """The scaling of Llama 3.1: long waves are stretched, short ones kept (arXiv 2407.21783).

    Parameters
    ----------
    factor
        Divisor of the frequencies of long waves.
    low_freq_factor, high_freq_factor
        Waves longer than ``original_max_position / low_freq_factor`` are stretched in full; waves
        shorter than ``original_max_position / high_freq_factor`` are kept; between them it is blended.
    original_max_position
        Longest context of the first training.

    Examples
    --------
    >>> scaling = Llama3Scaling(
    ...     factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    ... )
    >>> scaling.frequencies(500000.0, 4).round(6)
    array([1.00e+00, 5.25e-04])
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        low = number(self.low_freq_factor, "low_freq_factor")
        self._set(
            factor=number(self.factor, "factor"),
            low_freq_factor=low,
            high_freq_factor=number(self.high_freq_factor, "high_freq_factor", above=low),
            original_max_position=whole_number(
                self.original_max_position, "original_max_position", minimum=1
            ),
        )

    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, float64, shape (dim / 2,)."""
        kept = base_frequencies(theta, dim)
        turns = self.original_max_position * kept / (2.0 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        stretched = 1.0 - np.clip((turns - self.low_freq_factor) / width, 0.0, 1.0)
        return _blend(kept, self.factor, stretched)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Scaling):
    """LongRoPE: a divisor found by search for each pair, one set for short, one for long contexts.

    A model changes from the short set to the long one as a sequence grows. An index keeps the
    set of one length. Source: arXiv 2402.13753.

    Parameters
    ----------
    short_factor, long_factor
        Divisors, one a pair.
    original_max_position
        Longest context that takes the short set; at least 2.
    context
        Length that is served.
    factor
        How many times longer the context becomes: sets the attention factor.
    attention_factor
        Factor on rotated keys and queries; None computes it from `factor`. One of the two is needed.

    Examples
    --------
    >>> scaling = LongRopeScaling(
    ...     short_factor=[1, 1], long_factor=[1, 4], original_max_position=4096, context=8192, factor=2
    ... )
    >>> scaling.frequencies(10000.0, 4)
    array([1.    , 0.0025])
    >>> round(scaling.amplitude(), 4)
    1.0408
    """

    kind: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    context: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        self._set(
            short_factor=_numbers(self.short_factor, "short_factor"),
            long_factor=_numbers(self.long_factor, "long_factor"),
            original_max_position=whole_number(
                self.original_max_position, "original_max_position", minimum=2
            ),
            context=whole_number(self.context, "context", minimum=1),
            factor=_optional(self.factor, "factor"),
            attention_factor=_optional(self.attention_factor, "attention_factor"),
        )
        if self.factor is None and self.attention_factor is None:
            raise InvalidInputError("factor and attention_factor are both None, expected one of them")

    def frequencies(self, theta: float, dim: int) -> NDArray[np.float64]:
        """Return the scaled frequencies, float64, shape (dim / 2,).

        Raises
        ------
        InvalidInputError
            If there is not one divisor a pair.
        """
        for name in ("short_factor", "long_factor"):
            length = len(getattr(self, name))
            if length != dim // 2:
                raise InvalidInputError(f"{name} has length {length}, expected dim / 2 = {dim // 2}")
        is_long = self.context > self.original_max_position
        divisors = np.array(self.long_factor if is_long else self.short_factor, np.float64)
        return base_frequencies(theta, dim) / divisors

    def amplitude(self) -> float:
        """Return the factor on every rotated key and query."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_max_position))


_SCALINGS: tuple[type[Scaling], ...] = (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)


def _blend(
    frequencies: NDArray[np.float64], factor: float, stretched: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Divide by `factor` the share `stretched` of each frequency, and keep the rest as it is."""
    result: NDArray[np.float64] = frequencies / factor * stretched + frequencies * (1.0 - stretched)
    return result


def _optional(value: object, name: str, *, zero: bool = False) -> float | None:
    if value is None or (zero and value == 0 and not isinstance(value, bool)):
        return None
    return number(value, name)


def _numbers(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise InvalidInputError(f"{name} is a {type(values).__name__}, expected a list of numbers")
    return tuple(number(value, f"{name}[{i}]") for i, value in enumerate(values))
