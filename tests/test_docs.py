"""Every Python block of these pages runs, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(page, fence):
    """Run the blocks of a page behind such a fence; those for a GPU are ``py``, all others ``python``."""
    blocks = re.findall(rf"```{fence}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md", "docs/faiss.md", "docs/quickstart.md"])
def test_code_runs(page):
    run(page, "python")


@pytest.mark.gpu
def test_code_for_a_device_runs(cupy):
    run("docs/quickstart.md", "(?:python|py)")
