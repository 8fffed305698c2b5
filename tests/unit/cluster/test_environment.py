"""What the environment says, and what it may not say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paramserver.cluster import environment, jobset
from paramserver.errors import ConfigError
from paramserver.launch.spec import LEFT_ALONE


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "TOKEN_FILE", "INSECURE"):
        monkeypatch.delenv(f"PARAMSERVER_{name}", raising=False)


def test_without_variables_there_is_no_token() -> None:
    assert environment.read().token == ""
    assert not environment.read().insecure


@pytest.mark.parametrize("content", ["a secret", "a secret\n", "a secret\r\n", "a secret\n\n"])
def test_the_token_may_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (tmp_path / "token").write_bytes(content.encode())
    monkeypatch.setenv("PARAMSERVER_TOKEN_FILE", str(tmp_path / "token"))
    assert environment.read().token == "a secret"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the secret of the run from '.*token': No such file or directory"),
        (b"", "expected the secret of the run in '.*token', and it is empty"),
        (b"\n \n", "and it is empty"),
        (b"\xff\xfe", "it is not text in UTF-8"),
    ],
    ids=["missing", "empty", "blank", "not text"],
)
def test_a_file_without_a_token_is_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("PARAMSERVER_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=f"PARAMSERVER_TOKEN_FILE: .*{words}"):
        environment.read()


def test_the_cluster_may_lie_in_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("PARAMSERVER_TF_CONFIG_FILE", str(tmp_path / "cluster"))
    with pytest.raises(ConfigError, match="PARAMSERVER_TF_CONFIG_FILE: cannot read the cluster from '.*cluster'"):
        environment.read()
    for content in ('{"cluster": {}}', "{}"):
        (tmp_path / "cluster").write_text(content)
        assert environment.read().tf_config == content
    monkeypatch.setenv("TF_CONFIG", "of the launcher")
    assert environment.read().tf_config == "of the launcher"


def test_the_variable_comes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the tasks of a launcher, which gives each run a token of its own."""
    monkeypatch.setenv("PARAMSERVER_TOKEN_FILE", "/missing")
    monkeypatch.setenv("PARAMSERVER_TOKEN", "of the launcher")
    assert environment.read().token == "of the launcher"


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("0", False), ("", False)])
def test_insecure_is_a_flag(monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.setenv("PARAMSERVER_INSECURE", text)
    assert environment.read().insecure is expected


def test_a_flag_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_INSECURE", "yes")
    with pytest.raises(ConfigError, match="PARAMSERVER_INSECURE: expected 1, or 0 or nothing, got 'yes'"):
        environment.read()


def test_each_variable_that_is_read_is_listed() -> None:
    source = Path(environment.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r'\("([A-Z_]+)"', source.partition("def read")[2]))
    listed = {name for name, _ in (*environment.FOR_USERS, *environment.FROM_LAUNCHERS)}
    assert read | set(jobset.VARIABLES) == listed


def test_each_variable_to_which_launch_gives_a_value_is_listed() -> None:
    assert [name for name, _ in environment.DEFAULTS_OF_LAUNCH] == list(LEFT_ALONE)
