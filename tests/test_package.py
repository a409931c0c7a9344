"""The package as a whole: its names, its weight, its errors, its words."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import saapindex as sx
from saapindex import errors

ROOT = pathlib.Path(sx.__file__).parents[1]
HEAVY = (
    "cupy",
    "faiss",
    "hypothesis",
    "llvmlite",
    "matplotlib",
    "numba",
    "rich",
    "safetensors",
    "torch",
    "typer",
)
MODULES = sorted(module.name for module in pkgutil.walk_packages(sx.__path__, "saapindex."))


def fresh(code):
    """What `code` prints in a new interpreter."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_loads_numpy_alone_and_only_when_it_must():
    loaded = fresh("import sys, saapindex; print(*sys.modules)")
    assert not {*HEAVY} & {*loaded}
    assert [name for name in loaded if name.startswith("saapindex")] == ["saapindex"]


def test_parameters_and_names_are_light():
    loaded = fresh(
        "import sys, saapindex as sx; sx.IndexParameters, sx.IndexSAAP, sx.Rope; print(*sys.modules)"
    )
    assert not {*HEAVY} & {*loaded}


def test_the_reference_needs_no_compiler():
    code = "import sys, saapindex as sx; sx.IndexSAAP(4, 2, backend='reference'); print(*sys.modules)"
    assert not {*HEAVY} & {*fresh(code)}


def test_public_names_resolve():
    assert {*sx.__all__} == {*sx._HOMES}
    assert len({*sx.__all__}) == len(sx.__all__)
    for name in sx.__all__:
        assert getattr(sx, name) is getattr(importlib.import_module(sx._HOMES[name]), name)
    assert {*sx.__all__} <= {*dir(sx)}
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sx.nonsense  # noqa: B018


def test_public_names_are_sorted():
    """Constants, then classes, then functions, each by name."""
    assert sx.__all__ == sorted(sx.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_offers_exists_and_is_described(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name}.{public}"
        if inspect.isclass(thing) and thing.__module__ == name:
            for member, value in vars(thing).items():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if not member.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(getattr(thing, member)), f"{name}.{public}.{member}"


def test_errors_are_one_tree_that_also_speaks_python():
    tree = {
        errors.InvalidInputError: ValueError,
        errors.NotTrainedError: RuntimeError,
        errors.FileFormatError: ValueError,
        errors.MissingDependencyError: ImportError,
        errors.DeviceMemoryError: MemoryError,
    }
    for error, builtin in tree.items():
        assert issubclass(error, errors.SaapIndexError)
        assert issubclass(error, builtin)
    for warning in (errors.TrainingWarning, errors.PositionWarning):
        assert issubclass(warning, errors.SaapIndexWarning)
    assert issubclass(errors.SaapIndexWarning, UserWarning)
    classes = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
    assert classes == {*errors.__all__}


def test_a_missing_package_says_what_to_install():
    error = sx.MissingDependencyError("torch", "training a router", "learn")
    assert str(error) == (
        "training a router needs the package 'torch', which is not installed: pip install 'saapindex[learn]'"
    )


def test_the_changelog_knows_the_version():
    text = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert sx.__version__ in text


def test_types_are_shipped():
    assert (ROOT / "saapindex" / "py.typed").is_file()
