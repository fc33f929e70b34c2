"""What `foveate` itself offers for pruning."""

import subprocess
import sys

import pytest

import foveate
from foveate.vlm import pruning


def test_every_method_can_be_had_from_the_package() -> None:
    assert foveate.FastV is pruning.METHODS["fastv"]
    for method in pruning.METHODS.values():
        assert getattr(foveate, method.__name__) is getattr(pruning, method.__name__) is method
    assert foveate.reduce is pruning.reduce
    with pytest.raises(AttributeError, match="'Nothing'"):
        foveate.Nothing  # type: ignore[attr-defined] # noqa: B018


def test_the_package_imports_without_torch() -> None:
    code = "import sys, foveate; sys.exit('torch' in sys.modules or hasattr(foveate, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
