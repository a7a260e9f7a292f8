"""``python -m narrowcast``."""

from narrowcast.cli import main

main()
