"""What `foveate` itself offers for pruning."""

import subprocess
import sys

import foveate
from foveate.vlm import pruning


def test_every_method_can_be_had_from_the_package() -> None:
    assert {getattr(foveate, name) for name in foveate.__all__} == {*pruning.METHODS.values(), pruning.reduce}


def test_the_package_imports_without_torch() -> None:
    code = "import sys, foveate; sys.exit('torch' in sys.modules or hasattr(foveate, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
