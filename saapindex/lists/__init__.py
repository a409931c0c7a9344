"""Inverted lists: the keys of each part of the partition."""

from saapindex.lists.ragged import InvertedLists

__all__ = ["InvertedLists"]
