import ast
import io
import os
import socket
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import audit
import pytest
from listening import listeners

import lightning_n2uq
import warm
from lightning_n2uq.cli import main
from lightning_n2uq.cli.configs import run_name
from lightning_n2uq.datamodules._data import image_files
from lightning_n2uq.datamodules._data.decode import MAX_PIXELS, BrokenImageError, decode

SOURCES = sorted(
    {
        path
        for package in ("", ".callbacks", ".datamodules", ".configs")
        for folder in __import__(f"lightning_n2uq{package}", fromlist=["x"]).__path__
        for path in Path(folder).rglob("*.py")
    }
)
FORBIDDEN = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "dill.load", "dill.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen",
}  # fmt: skip
CODE = {"kernel_cache.py": ["pickle.loads"]}
"""Files that are code: kernels in numba's cache, which is as trusted as Python's own bytecode."""
KEY = "0123456789abcdef0123456789abcdef01234567"  # the form of a W&B key, and nobody's


def calls(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def dangers(source):
    """Calls that run code out of a file or a text."""
    found = []
    for name, keywords in calls(source):
        if name in FORBIDDEN:
            found.append(name)
        if (
            name in ("torch.load", "torch.hub.load")
            and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True"
        ):
            found.append(f"{name} without weights_only=True")
        if name.endswith("load_from_checkpoint") and "weights_only" in keywords:
            found += [name] * (ast.unparse(keywords["weights_only"]) != "True")
        if (
            name in ("np.load", "numpy.load")
            and ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) != "False"
        ):
            found.append(f"{name} with allow_pickle")
        if "shell" in keywords and ast.unparse(keywords["shell"]) != "False":
            found.append(f"{name} with shell")
    return found


@pytest.mark.integration
def test_nothing_in_the_package_runs_code_from_files():
    assert len(SOURCES) > 100
    found = {path: dangers(path.read_text()) for path in SOURCES}
    assert {str(path): names for path, names in found.items() if names != CODE.get(path.name, [])} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "pickle.load(file)", "torch.load(path)", "np.load(p, allow_pickle=True)",
        "torch.load(path, weights_only=False)", "subprocess.run(x, shell=True)", "yaml.load(text)",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(source):
    assert dangers(source)


def test_the_scan_lets_safe_calls_pass():
    assert dangers("model.eval()\nast.literal_eval(x)\ntorch.load(p, weights_only=True)\nnp.load(p)") == []
    assert lightning_n2uq.__version__


@pytest.mark.integration
def test_the_key_of_wandb_is_written_nowhere(tmp_path):
    # In a process of its own: W&B leaves the address of its service in the environment.
    folders = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    environment = os.environ | dict.fromkeys(folders, str(tmp_path))
    environment |= {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline", "NETRC": str(tmp_path / "netrc")}
    options = ["--model.backbone_args", "{width: 4}", "--trainer.max_epochs", "1"]
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    command = ["fit", "--config", "digits/n2uq_w2a2", *options, *limits]
    done = warm.n2uq(*command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)  # W&B did run
    assert {"config.yaml", "last.ckpt", "hparams.yaml"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in done.stdout + done.stderr


def bomb(width, height):
    """A PNG of a few kilobytes that claims width x height pixels, all of which are there."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 64))) + packer.flush()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# Pillow refuses the first itself; of the second it would only warn, and take 576 MB as RGBA.
@pytest.mark.parametrize(
    ("side", "words"), [(60_000, "exceeds limit of"), (12_000, f"allowed are {MAX_PIXELS} ")]
)
def test_a_decompression_bomb_is_refused_before_it_unfolds(side, words):
    data = bomb(side, side)
    assert len(data) < 10_000
    tracemalloc.start()
    with pytest.raises(BrokenImageError) as error:
        decode(data, "train/cat/bomb.png", 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    line = str(error.value)
    assert line.startswith("broken image file train/cat/bomb.png: ")
    assert words in line
    assert "\n" not in line


def test_an_archive_of_one_huge_image_is_refused_before_it_unfolds(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 2**20)
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/0.png", bytes(2**26))
        archive.writestr("train/cat/1.png", b"small")
    source = image_files.open_source(path)
    tracemalloc.start()
    with pytest.raises(BrokenImageError, match=f"train/cat/0.png: {2**26} bytes, allowed are {2**20}"):
        source.read("train/cat/0.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert source.read("train/cat/1.png") == b"small"


def test_a_file_on_disk_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    (tmp_path / "0.png").write_bytes(bytes(101))
    with pytest.raises(BrokenImageError, match=r"0.png: 101 bytes, allowed are 100"):
        image_files.open_source(tmp_path).read("0.png")


def test_damaged_bytes_of_an_archive_are_a_broken_image(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/0.png", os.urandom(4000))
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=r"train/cat/0\.png"):
        image_files.open_source(path).read("train/cat/0.png")


@pytest.mark.parametrize(
    "name", ["../../../tmp/x", "/abs", "~/x", "a/../../b", "..", "C:\\x", "a\x1b[2J", "a\x00b"]
)
def test_a_configs_name_cannot_leave_the_folder_of_the_runs(tmp_path, name):
    config = tmp_path / "c.yaml"
    config.write_text(f"# name: {name}\nmodel: null\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^config: .*c\.yaml' names its run .* allowed is a relative path"):
        run_name([str(config)])


def test_names_that_runs_have_are_allowed(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("# name: digits/n2uq_w2a2+nuqsgd (2)\n")
    assert run_name([str(config)]) == "digits/n2uq_w2a2+nuqsgd (2)"


def test_an_argument_that_unfolds_to_a_billion_entries_is_refused_at_once(capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    text = "{" + ", ".join([*lines, "x: *a8"]) + "}"
    for arguments in ([f"--model.init_args.backbone_args={text}"], ["--model.init_args.backbone_args", text]):
        assert main(["fit", "--config", "digits/n2uq_w2a2", *arguments]) == 2
        line = capsys.readouterr().err
        assert "entries, allowed are 100000" in line
        assert line.count("\n") == 1
    recursive = "&m {a: *m}"
    assert main(["fit", "--config", "digits/n2uq_w2a2", "--model.init_args.backbone_args", recursive]) == 2
    assert "holds itself" in capsys.readouterr().err


def test_the_bound_lets_large_photographs_pass():
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (2**12, 2**12)).save(file, "PNG")
    assert decode(file.getvalue(), "large.png", 1).size == (2**12, 2**12)


def test_the_table_of_listening_sockets_is_read_right():
    with (
        socket.create_server(("127.0.0.1", 0)) as loopback,
        socket.create_server(("0.0.0.0", 0)) as everywhere,
    ):
        found = {(str(address), port) for _, address, port in listeners(os.getpid())}
        assert ("127.0.0.1", loopback.getsockname()[1]) in found
        assert ("0.0.0.0", everywhere.getsockname()[1]) in found


@pytest.mark.integration
def test_two_ranks_on_one_machine_listen_on_loopback_only(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"WANDB_MODE": "disabled", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    options = [
        "--model.backbone_args",
        "{width: 2}",
        "--trainer.max_epochs",
        "1",
        "--trainer.logger",
        "false",
    ]
    limits = ["--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "nuqsgd"]
    command = ["fit", "--config", "digits/n2uq_w2a2", *options, *limits, *ranks]
    seen, output, errors = set(), tmp_path / "output", tmp_path / "errors"
    job = warm.start(*command, cwd=tmp_path, env=environment, out=output, err=errors)
    deadline = time.monotonic() + 200
    while job.is_alive() and time.monotonic() < deadline:
        seen |= listeners(job.pid)
        time.sleep(0.1)
    job.kill()
    job.join()
    assert job.exitcode == 0, errors.read_text()
    assert len({process for process, _, _ in seen}) == 2  # both ranks were seen
    assert (job.pid, port) in {(process, number) for process, _, number in seen}  # the store in rank 0
    assert {(p, str(address), number) for p, address, number in seen if not address.is_loopback} == set()


def test_a_port_that_is_taken_leaves_the_store_to_torch():
    from lightning.fabric.plugins.environments import LightningEnvironment

    from lightning_n2uq.strategies.meeting import meeting_store

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        patch.setenv("GLOO_SOCKET_IFNAME", "mine")
        environment = LightningEnvironment()
        environment.set_world_size(2)
        assert meeting_store(environment) is None
        assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"  # a choice of the user stays


def test_ranks_on_several_machines_meet_as_torch_has_them_meet():
    from lightning.fabric.plugins.environments import LightningEnvironment

    from lightning_n2uq.strategies.meeting import meeting_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "10.1.2.3")
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        assert meeting_store(LightningEnvironment()) is None
        assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("packages", "code", "line"),
    [
        ([{"name": "torch", "version": "2", "vulns": []}], 0, "1 of 1 packages checked, 0 known"),
        ([{"name": "torch", "version": "2", "vulns": [{"id": "CVE-1"}]}], 1, "torch 2: CVE-1"),
        ([{"name": "torch", "skip_reason": "not found"}], 2, "the service knows none of 1 packages"),
        (
            [{"name": "torch", "skip_reason": "x"}, {"name": "yaml", "version": "1", "vulns": []}],
            1,
            "not checked: torch",
        ),
        ([{"name": "lightning-n2uq", "skip_reason": "x"}], 2, "none of 0 packages"),
    ],
)
def test_the_audit_passes_only_what_was_checked(packages, code, line):
    found, lines = audit.verdict(packages)
    assert found == code
    assert any(line in text for text in lines)
