"""Damaged files: within 10 s and 512 MiB every reader ends with a value or a documented error of one line."""

import copy
import json
import os

import pytest
import torch
from fuzz_bounds import bounded
from fuzz_targets import TARGETS, Folder, Target, networks, official_model, outcome, with_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_n2uq.interop import load_official_checkpoint, official_state_dict

MEMORY = 2**29
pytestmark = pytest.mark.filterwarnings("ignore:.*")
ODD = [
    None, True, 0, -1, 3, 2**40, -(2**63), 1e300, float("nan"), float("inf"), "", "x", "\0", "1e999", [],
    [[]], {}, {"a": 1}, ["x"], [-1, -1], [2**40], "conv1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("N2UQ_DEBUG", raising=False)


@st.composite
def damaged(draw, seeds):
    """Flipped bits, cuts, insertions, repeated and spliced stretches of real files, or no file at all."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(
            st.sampled_from(["flip", "flip", "cut", "insert", "overwrite", "remove", "splice", "any"])
        )
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "overwrite":
            data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4, b"[" * 8]))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            data[at:] = other[draw(st.integers(0, len(other))) :]
        else:
            data = bytearray(draw(st.binary(max_size=64)))
    return bytes(data)


def fuzz(name, examples):
    target, seeds, found = TARGETS[name], TARGETS[name].seeds(), []
    assert {outcome(target, seed) for seed in seeds} == {"read"}  # they are whole

    @settings(max_examples=examples)
    @given(damaged(seeds))
    def attempt(data):
        with bounded(memory=MEMORY):
            found.append(outcome(target, data))

    attempt()
    return found


@pytest.mark.integration
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_in_one_line(name):
    found = fuzz(name, 40)
    assert len(found) >= 40
    assert name == "resume" or len({*found} - {"read"}) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_thousand_damaged_files_are_refused_in_one_line(name):
    assert len(fuzz(name, 1000)) >= 1000


@pytest.mark.integration
@settings(max_examples=60)
@given(st.data())
def test_a_list_of_steps_with_other_types_in_it(data):
    (file,) = networks()
    steps = json.loads(copy.deepcopy(_steps(file)))
    for _ in range(data.draw(st.integers(1, 3))):
        entry = data.draw(st.sampled_from(steps))
        key = data.draw(st.sampled_from(sorted(entry)))
        entry[key] = data.draw(st.sampled_from(ODD))
    with bounded(memory=MEMORY):
        assert outcome(TARGETS["safetensors"], with_steps(file, json.dumps(steps))) in ("read", "ValueError")


def _steps(file):
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size])["__metadata__"]["steps"]


@pytest.mark.parametrize("steps", ["[" * 100_000, "null", "3", '{"a": 1}', "[[]]", '[{"op": []}]'])
def test_lists_of_steps_that_are_none(steps):
    (file,) = networks()
    with bounded(memory=MEMORY):
        assert outcome(TARGETS["safetensors"], with_steps(file, steps)) == "ValueError"


ODD_TENSORS = {
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "integers": lambda x: x.to(torch.int8),
    "bool": lambda x: x.bool(),
    "other shape": lambda x: x.reshape(-1)[:1],
    "empty": lambda x: x.reshape(-1)[:0],
    "float8": lambda x: x.to(torch.float8_e5m2),
    "NaN": lambda x: torch.full_like(x, float("nan")),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_of_other_kinds_in_a_published_checkpoint(kind):
    state = official_state_dict(official_model())
    keys = sorted(key for key in state if state[key].is_floating_point())
    read = Target(list, lambda key: load_official_checkpoint({**state, key: _odd(kind, state[key])}, model))
    ends = []
    for key in (keys[0], next(k for k in keys if k.endswith(".two")), next(k for k in keys if "conv" in k)):
        model = official_model()
        before = copy.deepcopy(model.state_dict())
        with bounded(memory=MEMORY):
            ends.append(outcome(read, key))
        unchanged = all(torch.equal(before[k], value) for k, value in model.state_dict().items())
        assert unchanged or ends[-1] == "read"  # wholly or not at all
    assert set(ends) <= {"read", "ValueError"}


def _odd(kind, tensor):
    return ODD_TENSORS[kind](tensor)


@pytest.mark.integration
def test_a_config_that_unfolds_to_a_billion_entries_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    text = "\n".join(
        [*lines, "model: {class_path: QuantizedClassifier, init_args: {backbone_args: {x: *a8}}}"]
    )
    with bounded(memory=MEMORY):
        assert outcome(TARGETS["config"], text.encode()) == "ValueError"
    with bounded(memory=MEMORY):
        assert outcome(TARGETS["config"], b"model: " + b"[" * 50_000) == "ValueError"
    recursive = b"model: &m\n  class_path: QuantizedClassifier\n  init_args: *m\n"
    with bounded(memory=MEMORY):
        assert outcome(TARGETS["config"], recursive) == "ValueError"


@pytest.mark.parametrize("name", ["quantization.jsonl", "confusion.json", "metrics.csv"])
def test_run_files_with_other_types_in_them(name):
    number = ("metrics.csv", "quantization.jsonl", "confusion.json").index(name)
    texts = [
        "3", "null", "[]", "{}", '{"val": 3}', '{"val": [[1, 2], [3]]}', '{"step": "x", "layers": []}',
        '{"step": 1, "epoch": 0, "layers": [{"name": 3, "weight": {}, "activation": 1}]}', "[" * 100_000,
        '{"val": [["x"]]}', '{"step": [], "layers": 3}', "step\n\n1,2,3\n", "a,b\n1,2\n", "step,x\n1e9,2\n",
        "step,x\n1,nan\n", '{"step": 1e999, "epoch": NaN, "layers": null}', "\0", "\ufeff{}",
    ]  # fmt: skip
    for text in texts:
        with bounded(memory=MEMORY):
            end = outcome(TARGETS["report"], bytes([number]) + text.encode())
        assert end in ("read", "ValueError"), text


def test_files_that_are_folders_or_may_not_be_read(tmp_path):
    (tmp_path / "x.ckpt").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for name in ("x.ckpt", "loop", "absent"):
        for reader in ("checkpoint", "official", "safetensors"):
            read, path = TARGETS[reader].read, tmp_path / name
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Folder, "write", lambda *_, path=path: path)
                assert outcome(Target(list, read), b"") == "ValueError", (name, reader)
