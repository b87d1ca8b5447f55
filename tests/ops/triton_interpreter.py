"""What tests of Triton's interpreter need."""

import numpy
import pytest
from packaging.version import Version


def need_interpreter() -> None:
    """Skips the test where there is no Triton, or one that its numpy is too new for."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")
