"""Inverted lists: the keys of each part of the partition."""

from saapindex.lists.ragged import InvertedLists, KeyCodes, Stored

__all__ = ["InvertedLists", "KeyCodes", "Stored"]
