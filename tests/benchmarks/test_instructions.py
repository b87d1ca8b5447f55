"""What `python -m benchmarks.instructions` counts, and that kernels keep within a thread's registers."""

import pytest

from benchmarks import instructions

LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   FADD R3, R3, R2 ;
        /*0030*/                   NOP;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_loop_is_counted_without_padding() -> None:
    middle = "        /*0015*/                   FFMA R4, R4, R5, R6 ;\n" * 20
    loop = instructions.longest_loop(LOOP.replace("        /*0020*/", middle + "        /*0020*/"))
    assert len(loop) == 23
    assert loop[0].startswith("LDG.E")
    assert len(instructions.longest_loop(LOOP)) == 6  # no loop worth the name: all of it


@pytest.mark.integration
@pytest.mark.parametrize(
    ("title", "most"),
    [("chain, 4 bits, behind a norm: sums", 95), ("stem, input", 70), ("block's end, forward", 20)],
)
def test_kernels_spill_nothing_and_load_groups_at_once(title: str, most: int) -> None:
    pytest.importorskip("triton")
    (case,) = (case for case in instructions.CASES if case.title == title)
    cost = instructions.measure(case)
    assert cost.spilled == 0
    assert cost.barriers == 0
    assert cost.registers <= 160  # three programs of 128 threads, with any release of Triton
    assert most / 3 < cost.instructions < most  # twice as many where values are loaded one by one
