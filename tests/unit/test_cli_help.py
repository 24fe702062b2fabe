"""What --help shows on a narrow terminal, and what a shell is told to complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epserve import cli
from epserve.environment import variable_of
from epserve.settings_command import settings_of
from support.command_options import commands

COMMANDS = sorted(commands())
SHELLS = ("bash", "zsh", "fish")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_name_whole(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", help_of(name, capsys)))
    for option in settings_of(commands()[name]):
        assert {*option.opts, *option.secondary_opts} <= shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_no_wider_than_the_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_of(name, capsys).splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_variable_and_default_of_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
):
    words = " ".join(help_of(name, capsys).split())
    for option in settings_of(commands()[name]):
        assert f"env var: {variable_of(option.name)}" in words
        if option.default is not None and not option.is_flag:
            assert f"{variable_of(option.name)}; default: {option.default}" in words


def test_options_stand_under_headings_and_the_rest_last(capsys: pytest.CaptureFixture[str]):
    text = help_of("serve", capsys)
    headings = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert {"Model", "Parallel layout", "Cache and scheduling", "Network", "Logging"} < {*headings}
    assert headings[-1] == "Options"
    sections = dict(
        zip(headings, re.split(r"^[A-Z].*:$", text, flags=re.MULTILINE)[1:], strict=True)
    )
    assert "--dp-size" in sections["Parallel layout"]
    assert "--block-size" in sections["Cache and scheduling"]
    assert "--config" in sections["Options"]
    assert "--help" in sections["Options"]


def complete(
    shell: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("_EPSERVE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit) as ended:
        cli.run([])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("epserve ", {"serve", "gateway", "attn", "expert", "status"}),
        ("epserve serve --expert-", {"--expert-devices", "--expert-parallel-degree"}),
        ("epserve serve --no-col", {"--no-colocated"}),
        ("epserve attn --dtype ", {"auto", "float32", "bfloat16"}),
        (
            "epserve serve --model missing --dp-size x --config missing --shared-experts a",
            {"attention"},
        ),
    ],
)
def test_shells_are_told_the_candidates(
    shell: str,
    line: str,
    candidates: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    offered = complete(shell, line, monkeypatch, capsys)
    assert candidates <= set(re.findall(r"[\w-]+", offered))
    assert "--block-size" not in offered


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_shown_and_installed(
    shell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    for action in ("--show-completion", "--install-completion"):
        with pytest.raises(SystemExit) as ended:
            cli.run([action, shell])
        assert ended.value.code == 0
    assert "_EPSERVE_COMPLETE=complete_" in capsys.readouterr().out
    assert any("epserve" in path.name for path in tmp_path.rglob("*"))


def test_bash_completes_with_the_script_that_is_shown(tmp_path: Path):
    program = tmp_path / "epserve"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m epserve "$@"\n')
    program.chmod(0o755)
    shown = (
        'eval "$(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 epserve --show-completion bash)"\n'
        "COMP_WORDS=(epserve serve --dt); COMP_CWORD=2; _epserve_completion epserve\n"
        'echo "${COMPREPLY[@]}"; complete -p epserve\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", shown],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "--dtype",
        "complete -o default -F _epserve_completion epserve",
    ]


def test_completing_imports_neither_torch_nor_grpc():
    program = (
        "import atexit, sys; from epserve.cli import run;"
        "heavy = ('torch', 'grpc', 'transformers');"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]));"
        "run([])"
    )
    asked = {
        "_EPSERVE_COMPLETE": "complete_bash",
        "COMP_WORDS": "epserve attn --dev",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines() == ["--device", "[]"]
