"""Who may use the page: as given, in the environment or in a file, and refused in words where that cannot be meant."""

import asyncio
import os

import pytest

from tests.commands import web as web_command
from visualglm_tools.serving.page import accounts
from visualglm_tools.serving.page.accounts import VARIABLE, login_of, read_accounts


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    (path := tmp_path / "users").touch(0o600)
    return path


def test_users_come_from_the_command_line_the_environment_and_a_file_together(file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "b:2\nc:3\n")
    file.write_text("# who works here\n\n李:密 码:4 \n", encoding="utf-8")
    assert read_accounts(["a:1"], file) == {"a": "1", "b": "2", "c": "3", "李": "密 码:4"}


def test_nobody_has_to_log_in_where_nothing_is_given(file):
    assert read_accounts() == {}
    assert login_of({}) is None


@pytest.mark.parametrize(
    ("given", "written", "message"),
    [
        (["secret"], None, "no colon"),
        (["me:"], None, "no password"),
        ([":secret"], None, "USER:PASSWORD"),
        (["me:1"], "me:2", "two passwords for the user 'me'"),
        ([], "# nobody\n", "there is no user in"),
        ([], "secret", "no colon"),
    ],
)
def test_what_is_no_user_with_a_password_is_refused_without_telling_it(file, given, written, message):
    if written is not None:
        file.write_text(written)
    with pytest.raises(ValueError, match=message) as refusal:
        read_accounts(given, None if written is None else file)
    assert "secret" not in str(refusal.value)


def test_an_empty_variable_opens_no_page_that_was_to_be_closed(file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ValueError, match=VARIABLE):
        read_accounts()


@pytest.mark.skipif(os.name != "posix", reason="files have other permissions there")
def test_a_file_that_others_may_read_is_refused_before_the_model_is_loaded(file, capsys):
    file.write_text("me:secret")
    file.chmod(0o644)
    assert web_command("--port", 0, "--auth-file", file) == 2
    error = capsys.readouterr().err
    assert "chmod 600" in error and "Loading" not in error
    assert web_command("--port", 0, "--auth-file", file.with_name("none")) == 2
    assert "cannot read the users" in capsys.readouterr().err


def test_only_the_users_own_password_is_right(monkeypatch):
    monkeypatch.setattr(accounts, "REFUSAL_SECONDS", 0)
    is_right = login_of({"me": "1", "李": "密码"})

    def found(user: str, password: str) -> bool:
        return asyncio.run(is_right(user, password))

    assert found("me", "1") and found("李", "密码")
    assert not any(
        found(*each) for each in (("me", "密码"), ("me", ""), ("", ""), ("you", "1"), ("you", ""), ("Me", "1"))
    )
