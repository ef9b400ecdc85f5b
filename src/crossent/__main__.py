"""``python -m crossent``."""

from .cli import main

main(prog_name="crossent")
