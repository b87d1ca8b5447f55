"""The table of networks is made in pieces: nothing is done twice, and nothing that is done is lost."""

import json

import pytest

from benchmarks.networks import __main__ as bench


@pytest.fixture
def tried(monkeypatch):
    names = []
    networks = {name: (lambda name=name: name) for name in ("timm a", "timm b", "other c")}
    monkeypatch.setattr(bench, "NETWORKS", networks)
    monkeypatch.setattr(bench, "trial", lambda build: names.append(build()) or {"error": build()})
    return names


def test_a_run_goes_on_where_it_was(tried, tmp_path, capsys):
    output = tmp_path / "new" / "networks.json"
    bench.main(["--only", "timm b", "--output", str(output)])
    bench.main(["--only", "timm *", "--output", str(output)])
    bench.main(["--output", str(output)])
    bench.main(["--output", str(output)])
    assert tried == ["timm b", "timm a", "other c"]
    assert json.loads(output.read_text()).keys() == set(tried)
    capsys.readouterr()
    bench.main(["--table", "--output", str(output)])
    assert len(tried) == 3
    assert [line[:9] for line in capsys.readouterr().out.splitlines()[2:5]] == [
        "| timm a ",
        "| timm b ",
        "| other c",
    ]
    bench.main(["--only", "timm *", "--again", "--output", str(output)])
    assert tried[3:] == ["timm a", "timm b"]


def test_runs_at_once_keep_each_other_s_results(tried, tmp_path, monkeypatch):
    output = tmp_path / "networks.json"

    def meanwhile(build):
        tried.append(build())
        if len(tried) == 1:
            bench.main(["--only", "timm b", "--output", str(output)])
        return {}

    monkeypatch.setattr(bench, "trial", meanwhile)
    bench.main(["--output", str(output)])
    assert tried == ["timm a", "timm b", "other c"]
    assert json.loads(output.read_text()).keys() == set(tried)
    assert list(tmp_path.iterdir()) == [output]
