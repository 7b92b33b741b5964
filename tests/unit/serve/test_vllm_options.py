"""Options of `vllm serve`, read as its own parser reads them."""

from __future__ import annotations

import shlex

import pytest

from reap_serve.serve.become import shell_line
from reap_serve.serve.command import ADDITIONAL_CONFIG, WORKER_OPTION, ServerCommand
from reap_serve.serve.vllm_options import is_option, option_name, redacted


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", "SECRET"],
        ["--api-key", "SECRET", "SECRET2"],
        ["--api-key=SECRET"],
        ["--api_key", "SECRET"],
        ["--api_key=SECRET"],
        ["--api-k", "SECRET"],
        ["--api_k=SECRET"],
        ["--api-k", "SECRET", "--port", "8000"],
        ["--hf-token", "SECRET"],
        ["--hf_tok=SECRET"],
        ["--ssl-keyfile-password", "SECRET"],
        ["--ssl_keyfile_pass=SECRET"],
        ["--watermark-config", '{"a": "SECRET"}'],
        ["--some-new-token", "SECRET"],
        ["--kv-transfer-config", '{"extra": [{"access_key": "SECRET", "kv_role": "both"}]}'],
        ["--kv-transfer-config.extra.access_key", "SECRET"],
        ["--kv-transfer-config.extra.access_key=SECRET"],
        ["--otlp-traces-endpoint", "http://me:SECRET@host:4317"],
        ["--otlp-traces-endpoint=http://SECRET@host:4317"],
    ],
)
def test_a_secret_is_not_printed(arguments: list[str]) -> None:
    line = shell_line(ServerCommand(("python", "serve", "org/model", *arguments, "-tp", "2"), {"A": "b c"}))
    assert "SECRET" not in line
    assert "***" in line
    words = shlex.split(line)
    assert words[:4] == ["A=b c", "python", "serve", "org/model"]
    assert words[-2:] == ["-tp", "2"]


def test_all_else_is_printed() -> None:
    arguments = [
        *("python", "serve", "org/model", "--port", "8000", "--max-num-batched-tokens=8192", "--ssl-keyfile", "/k.pem"),
        *("--allowed-headers", '["x-api"]', "--spec-tokens", "3", "--enforce-eager", "-tp", "2", "--tokenizer", "t"),
        *("--additional-config", '{"reap_serve": {"recording": true}}', "--", "--api", "x"),
    ]
    assert redacted(arguments[:-3]) == arguments[:-3]


def test_names_are_read_as_vllm_reads_them() -> None:
    assert option_name("--api_key=a_b") == "--api-key"
    assert option_name("--a_b.c_d") == "--a-b"
    assert option_name("-tp") is None
    assert option_name("--") is None
    assert option_name("value_of=x") is None


def test_abbreviations_are_those_that_vllms_parser_takes() -> None:
    """Every prefix that its parser resolves to the option is one to us; those that it refuses may be either."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    (command,) = cmd_init()
    serve = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    for option, shortest in ((WORKER_OPTION, "--worker-e"), (ADDITIONAL_CONFIG, "--ad"), ("--api-key", "--api-k")):
        for length in range(3, len(option) + 1):
            prefix = option[:length]
            matches = {match[1] for match in serve._get_option_tuples(prefix)} | (
                {prefix} if prefix in serve._option_string_actions else set()
            )
            if matches == {option}:
                assert is_option(prefix, option, shortest), prefix
                assert is_option(f"{prefix.replace('-', '_').replace('__', '--', 1)}=x", option, shortest), prefix
