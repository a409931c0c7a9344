"""Adapters to language-model runtimes: one file each, none knows another."""
