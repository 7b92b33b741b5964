"""`python -m reap_serve` is the `reap-serve` program."""

from reap_serve.cli.app import main

main()
