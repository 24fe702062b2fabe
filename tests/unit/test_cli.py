"""The command line's exit statuses, error lines and options, without starting a process."""

import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from epserve import cli
from epserve.generate_messages import Sampling
from epserve.generate_options import token_ids
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.errors import CheckpointError
from support.full_sampling import FULL_SAMPLING

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"
COMMANDS = [
    *("demo", "serve", "gateway", "attn", "expert", "generate", "status", "top", "chaos"),
    *("manifest", "scale", "rebalance", "drain", "certs", "bench", "keys"),
]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS


@pytest.mark.parametrize("arguments", [[], ["keys"], ["bench"]])
def test_a_group_without_a_command_prints_its_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(" ".join(["Usage: epserve", *arguments]))
    assert "Commands:" in lines


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"epserve {version('epserve')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_debug(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run([command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "Missing option '--model'"),
        (["serve", "--model", str(TINY), "--dp-size", "3"], "dp_size=3: must be a power of two"),
        (["serve", "--model", str(TINY), "--dtype", "int4"], "'int4' is not one of"),
        (["serve", "--model", str(TINY), "--nonsense"], "--nonsense"),
        (["serve", "--model", str(TINY), "--microbatches", "4"], "'4' is not one of"),
        (["serve", "--model", str(TINY), "--kv-cache-memory", "lots"], "kv_cache_memory='lots'"),
        (
            [
                "attn",
                "--model",
                str(TINY),
                "--kv-cache-tokens",
                "64",
                "--memory-utilization",
                "0.5",
            ],
            "kv_cache_tokens=64: cannot be combined with memory_utilization=0.5",
        ),
        (["nonsense"], "nonsense"),
        (["chaos", "--faults", "kill,flood"], "faults='kill,flood': 'flood' is none of them"),
        (["chaos", "--roles", "experts"], "nearest valid: gateway,attn,expert"),
        (["chaos", "--concurrency", "0"], "concurrency=0: must be at least 1"),
        (["chaos", "--duration", "nan"], "duration=nan: must be a number of seconds above 0"),
        (["chaos", "--freeze", "0"], "freeze=0.0: must be a number of seconds above 0"),
        (["bench", "faults", "--rows", "earthquake"], "'earthquake' is none of them"),
        (["bench", "faults", "--rounds", "0"], "rounds=0: must be at least 1"),
        (
            ["serve", "--model", str(TINY), "--grpc-port", "99999"],
            "must be at least 0 and at most 65535; nearest valid: 65535",
        ),
        (
            ["serve", "--model", str(TINY), "--host", "0.0.0.0"],
            "host='0.0.0.0': other machines reach this address",
        ),
        (
            ["expert", "--model", str(TINY), "--tls-ca", "ca.crt"],
            "tls_cert: a process needs --tls-cert, --tls-key and --tls-ca, or none",
        ),
        (
            ["gateway", "--model", str(TINY), "--api-keys", "/nowhere/keys"],
            "api_keys='/nowhere/keys': cannot be read",
        ),
        (
            ["attn", "--model", str(TINY), "--advertise-address", "a b"],
            "advertise_address='a b': must be a host name",
        ),
        (["attn", "--model", str(TINY), "--rank", "-1"], "rank=-1: must be at least 0"),
        (["expert", "--model", str(TINY), "--gateway", "nowhere"], "gateway='nowhere'"),
        (["status", "--target", "127.0.0.1"], "target='127.0.0.1': must be HOST:PORT"),
        (
            ["status", "--target", "http://127.0.0.1:8000"],
            "target='http://127.0.0.1:8000': is a URL; must be HOST:PORT",
        ),
        (["generate"], "epserve: prompt: give exactly one of --prompt and --prompt-ids"),
        (["scale"], "epserve: experts: give --experts, --attn or both"),
        (["generate", "--prompt-ids", "1,x"], "prompt_ids='1,x'"),
        (["generate", "--prompt-ids", "1", "--stop-token-ids", ""], "stop_token_ids=''"),
        (["generate", "--prompt-ids", "1", "--logit-bias", "5"], "logit_bias='5': must be"),
        (["generate", "--prompt-ids", "1", "--logit-bias", "a=1"], "logit_bias='a=1'"),
        (["generate", "--prompt-ids", "1", "--logprobs", "2"], "logprobs=2: is shown with --json"),
    ],
)
def test_a_refused_argument_is_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("epserve: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_any_other_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["status", "--target", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert error.count("\n") == 1


def test_debug_adds_the_traceback_and_keeps_the_line(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["serve", "--model", "/nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("epserve: model='/nowhere'")


def test_an_unforeseen_error_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(_settings: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("epserve.serve.serve", broken)
    assert cli.run(["serve", "--model", str(TINY)]) == 1
    line = "epserve: internal error: ZeroDivisionError: first second (--debug shows where)\n"
    assert capsys.readouterr().err == line


def test_an_interrupted_generate_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("epserve.generate.generate", lambda *_arguments, as_json: as_json)
    assert cli.run(["generate", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "epserve: interrupted\n"


def test_an_epserve_error_without_invalid_argument_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(_settings: object) -> None:
        raise CheckpointError("model.safetensors is cut short")

    monkeypatch.setattr("epserve.serve.serve", broken)
    assert cli.run(["serve", "--model", str(TINY)]) == 1
    assert capsys.readouterr().err == "epserve: model.safetensors is cut short\n"


def test_help_imports_neither_torch_nor_grpc():
    program = (
        "import sys; from epserve.cli import run; assert run(['serve', '--help']) == 0;"
        "print([name for name in ('torch', 'grpc', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_long_options_are_named_as_the_settings():
    names = {
        option
        for parameter in typer.main.get_command(cli.app).commands["serve"].params
        for option in parameter.opts
    }
    assert {
        "--attn-devices",
        "--expert-devices",
        "--dp-size",
        "--ep-size",
        "--enable-mla",
        "--expert-parallel-degree",
        "--num-redundant-experts",
        "--shared-experts",
        "--colocated",
    } <= names


def test_token_ids_are_read_from_a_comma_separated_list():
    assert token_ids("prompt_ids", "1, 2,3") == (1, 2, 3)


def test_generate_has_an_option_for_every_sampling_field(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[object, Sampling, bool]] = []

    def generate(_target: str, prompt: object, sampling: Sampling, *, as_json: bool) -> bool:
        given.append((prompt, sampling, as_json))
        return True

    monkeypatch.setattr("epserve.generate.generate", generate)
    arguments = {
        "max_tokens": "9",
        "temperature": "0.5",
        "top_p": "0.25",
        "top_k": "3",
        "min_p": "0.125",
        "seed": "7",
        "stop": "END",
        "stop_token_ids": "4,5",
        "repetition_penalty": "1.5",
        "presence_penalty": "-2",
        "frequency_penalty": "2",
        "logprobs": "20",
        "logit_bias": "15=-2.5",
        "min_tokens": "2",
        "n": "2",
        "prompt_logprobs": "3",
    }
    assert {*arguments, "ignore_eos"} == {field.name for field in fields(Sampling)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    command = ["generate", "--prompt", "x", "--json", "--ignore-eos", "--logit-bias", "3=1"]
    assert cli.run([*command, *options]) == 0
    assert given == [("x", FULL_SAMPLING, True)]


def test_manifest_writes_a_file_beside_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    assert cli.run(["manifest", str(model)]) == 0
    words, path = capsys.readouterr().out.split()
    assert words == "wrote"
    assert Path(path).parent == model
    assert Path(path).is_file()


def test_manifest_of_a_changed_checkpoint_replaces_the_one_that_is_there(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    assert cli.run(["manifest", str(model)]) == 0
    with (model / "config.json").open("a") as config:
        config.write("\n")
    assert cli.run(["manifest", str(model)]) == 0
    Checkpoint.open(model)


def test_manifest_of_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["manifest", str(tmp_path)]) == 2
    assert "must hold a config.json" in capsys.readouterr().err
