"""`make release`: what is built is a commit, with digests that can be signed and verified as the documents say.

That the bytes are the same wherever it is built is in `test_packaging.py`.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import run
from tests.paths import ROOT
from tools.release import SUMS_FILE, export, main, release, write_sums


KEY_TYPE = "ed25519"


def in_document(name: str, start: str) -> str:
    """The command in a document that begins so."""
    (line,) = re.findall(rf"^\s*({re.escape(start)}.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return line


@pytest.fixture
def dist(tmp_path) -> Path:
    """A folder as a release writes it, with less in it."""
    folder = tmp_path / "dist"
    folder.mkdir()
    (folder / "visualglm_hf-0-py3-none-any.whl").write_bytes(b"wheel")
    (folder / "visualglm_hf-0.tar.gz").write_bytes(b"archive")
    write_sums(folder)
    return folder


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with one commit, and a file that is in none."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "committed").write_text("as committed")
    (folder / "pyproject.toml").write_text("[project")  # nothing can be built of it
    (folder / "link").symlink_to("committed")
    git = ("git", "-C", folder, "-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "First")):
        run(*git, *words)
    (folder / "lying around").touch()
    return folder


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_digests_are_signed_and_verified_as_the_documents_say(dist, tmp_path):
    run("ssh-keygen", "-q", "-t", KEY_TYPE, "-N", "", "-C", "", "-f", tmp_path / "key")
    public = (tmp_path / "key.pub").read_text().strip()
    (dist / "allowed_signers").write_text(f'somebody namespaces="visualglm-hf" {public}\n')
    sign = in_document("CONTRIBUTING.md", "ssh-keygen -Y sign").replace("KEY", "key")
    run("bash", "-c", sign, cwd=tmp_path)
    verify = in_document("docs/verifying.md", "ssh-keygen -Y verify").replace("NAME", "somebody")
    assert "Good" in run("bash", "-c", verify, cwd=dist).stdout
    with (dist / SUMS_FILE).open("a") as file:
        file.write("0" * 64 + "  another.whl\n")
    assert run("bash", "-c", verify, cwd=dist, code=None).returncode != 0


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_digests_are_read_as_the_documents_say(dist):
    check = in_document("docs/verifying.md", "sha256sum --check")
    assert run("bash", "-c", check, cwd=dist).stdout.count(": OK\n") == 2
    (dist / "visualglm_hf-0.tar.gz").write_bytes(b"Archive")
    assert run("bash", "-c", check, cwd=dist, code=1).stdout.count(": FAILED\n") == 1


def test_what_is_released_is_the_commit_alone(repository, tmp_path):
    export(repository, tmp_path / "source")
    assert {path.name for path in (tmp_path / "source").iterdir()} == {"committed", "link", "pyproject.toml"}
    assert (tmp_path / "source" / "link").read_text() == "as committed"
    assert (tmp_path / "source" / "committed").stat().st_mode & 0o777 == 0o644


def test_changes_that_are_in_no_commit_are_not_released(repository, tmp_path):
    pytest.importorskip("cyclonedx")
    (repository / "committed").write_text("changed")
    with pytest.raises(ValueError, match="committed is in no commit"):
        release(repository, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_a_release_overwrites_no_other(dist, capsys):
    pytest.importorskip("cyclonedx")
    before = sorted(dist.iterdir())
    assert main(dist) == 2
    assert "holds something already" in capsys.readouterr().err
    assert sorted(dist.iterdir()) == before


def test_a_build_that_fails_says_why(repository, tmp_path):
    pytest.importorskip("cyclonedx")
    with pytest.raises(ValueError, match="build_sdist failed: "):
        release(repository, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.slow
def test_two_releases_of_a_commit_are_the_same_to_the_bit(tmp_path):
    """From a clone of this checkout's commit, with another umask."""
    pytest.importorskip("cyclonedx")
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode != 0:
        pytest.skip("no repository")
    for name, umask in (("one", "022"), ("other", "077")):
        run("git", "clone", "-q", ROOT, tmp_path / name)
        build = f"umask {umask}; python -m tools.release dist"
        run("bash", "-c", build, cwd=tmp_path / name)  # whose own tools come first
    one, other = (tmp_path / name / "dist" for name in ("one", "other"))
    assert len(list(one.iterdir())) == 4
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }
