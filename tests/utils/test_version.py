import re
import subprocess

from lightning_n2uq.utils import version


def test_the_revision_is_that_of_the_checkout_or_unknown(monkeypatch):
    version.git_revision.cache_clear()
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", version.git_revision())
    version.git_revision.cache_clear()

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert version.git_revision() == version.UNKNOWN
    version.git_revision.cache_clear()
