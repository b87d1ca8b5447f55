"""A few cases of each Triton kernel under the interpreter, in one process; marker `compiled` has all."""

import pytest
from triton_interpreter import interpret

pytestmark = pytest.mark.integration

CHECKS = {
    "quantizers": "import triton_cases; triton_cases.check_few()",
    "chain": "import triton_chain_cases; triton_chain_cases.check_few('cpu')",
    "codec": "import test_nuq_kernels; test_nuq_kernels.check_triton_few()",
}
# Every check runs, whatever became of those before it.
CODE = """
import sys, traceback
for name, code in {checks!r}.items():
    try:
        exec(code)
        print(name)
    except Exception:
        print(name, "failed:", traceback.format_exc())
"""


@pytest.fixture(scope="module")
def passed() -> str:
    return interpret(CODE.format(checks=CHECKS))


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_equal_the_reference_under_the_interpreter(passed: str, name: str) -> None:
    assert name in passed.splitlines(), passed
