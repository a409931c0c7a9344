"""Inverted lists: the keys of each part of the partition."""

from saapindex.lists.ragged import InvertedLists, KeyCodes

__all__ = ["InvertedLists", "KeyCodes"]
