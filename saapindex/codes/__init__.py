"""Small codes of keys: what a query needs to tell which keys are worth fetching."""

from saapindex.backends.reference.codes import pack, unpack
from saapindex.codes.fit import fit_codes
from saapindex.codes.rows import quantise_rows, rounded_rows
from saapindex.codes.slopes import fit_slopes
from saapindex.codes.transform import TransformCode

__all__ = ["TransformCode", "fit_codes", "fit_slopes", "pack", "quantise_rows", "rounded_rows", "unpack"]
