"""``python -m interlayer``."""

from interlayer.cli import main

main()
